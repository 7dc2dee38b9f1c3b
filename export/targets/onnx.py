"""ONNX by torch.export and the dynamo exporter, served by ONNX Runtime."""

from pathlib import Path

from export.lowering import OPSET, write_onnx
from export.source import OPERATOR, Source
from export.target import Target


def convert(source: Source, precision: str, out: Path) -> dict[str, str]:
    """Write `model.onnx`. In fp16 the parameters are half and what a module keeps in float32 stays so."""
    write_onnx(source, OPERATOR, precision, out / "model.onnx")
    return {"opset": str(OPSET)}


TARGET = Target(
    name="onnx",
    runtime="onnxruntime",
    triton="onnxruntime",
    precisions=("fp32", "fp16"),
    packages=("torch", "onnx", "onnxscript", "onnxruntime"),
    convert=convert,
)
