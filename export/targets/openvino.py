"""OpenVINO's own format, converted from an ONNX file; for CPUs, in float32 or calibrated int8."""

from pathlib import Path

from export.lowering import OPSET, write_onnx
from export.quantization.static import calibration_inputs, quantize_static
from export.source import OPERATOR, Source
from export.target import Built, Target
from runtimes.engines.openvino import MODEL_FILE, openvino_errors
from runtimes.errors import EngineError, one_line, require


def convert(source: Source, precision: str, out: Path) -> Built:
    """Write model.xml and model.bin; `EngineError` for an operator that OpenVINO does not have."""
    openvino = require("openvino", extra="openvino")
    onnx_path = out / "model.onnx"
    write_onnx(source, OPERATOR, "fp32", onnx_path)
    if precision == "int8":
        quantize_static(onnx_path, calibration_inputs(source), source.spec.export.fp32_modules)
    try:
        model = openvino.convert_model(onnx_path)
    except openvino_errors() as error:
        raise EngineError(f"openvino cannot convert the model: {one_line(error)}") from error
    openvino.save_model(model, out / MODEL_FILE, compress_to_fp16=False)
    for read in out.glob(f"{onnx_path.name}*"):
        read.unlink()
    return Built(built_with={"opset": str(OPSET)})


TARGET = Target(
    name="openvino",
    runtime="openvino",
    precisions=("fp32", "int8"),
    packages=("torch", "onnx", "onnxscript", "openvino"),
    convert=convert,
)
