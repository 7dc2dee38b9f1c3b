"""Triton's backend for ONNX Runtime."""

from export.triton.backend import Backend
from runtimes.engines.onnxruntime import MODEL_FILE

BACKEND = Backend(
    name="onnxruntime",
    file=MODEL_FILE,
    platforms=("onnxruntime_onnx",),
    cpu_parameters={"intra_op_thread_count": "1", "inter_op_thread_count": "1"},
)
