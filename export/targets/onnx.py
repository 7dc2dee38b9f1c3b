"""ONNX by torch.export and the dynamo exporter, served by ONNX Runtime."""

from pathlib import Path

from export.lowering import OPSET, quantize_weights, write_onnx
from export.source import OPERATOR, Source
from export.target import Built, Target
from runtimes.engines.onnxruntime import MODEL_FILE


def convert(source: Source, precision: str, out: Path) -> Built:
    """Write the model; in fp16 its parameters are half, and what its module keeps in float32 stays so.

    int8 is for CPUs: weights by channel, activations as they come.
    """
    write_onnx(source, OPERATOR, "fp32" if precision == "int8" else precision, out / MODEL_FILE)
    if precision == "int8":
        quantize_weights(out / MODEL_FILE, source.spec.exact)
    return Built(built_with={"opset": str(OPSET)})


TARGET = Target(
    name="onnx",
    runtime="onnxruntime",
    precisions=("fp32", "fp16", "int8"),
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    convert=convert,
)
