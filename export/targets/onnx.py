"""ONNX by torch.export and the dynamo exporter, served by ONNX Runtime."""

from pathlib import Path

from export.lowering import OPSET, quantize_weights, write_onnx
from export.quantization.static import calibration_inputs, quantize_static
from export.source import OPERATOR, Source
from export.target import Built, Target
from runtimes.engines.onnxruntime import MODEL_FILE


def convert(source: Source, precision: str, out: Path) -> Built:
    """Write the model; in fp16 its parameters are half precision, but for those that its module keeps in float32.

    int8 has its scales in the file. int8_dynamic, for CPUs only, computes those of its activations in each batch.
    """
    path = out / MODEL_FILE
    write_onnx(source, OPERATOR, "fp16" if precision == "fp16" else "fp32", path)
    if precision == "int8":
        quantize_static(path, calibration_inputs(source), source.spec.export.fp32_modules)
    elif precision == "int8_dynamic":
        quantize_weights(path, source.spec.export.fp32_modules)
    return Built(built_with={"opset": str(OPSET)})


TARGET = Target(
    name="onnx",
    runtime="onnxruntime",
    precisions=("fp32", "fp16", "int8", "int8_dynamic"),
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    convert=convert,
    ensemble_rank=0,
)
