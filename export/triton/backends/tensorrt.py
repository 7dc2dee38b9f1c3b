"""Triton's backend for NVIDIA's TensorRT."""

from export.triton.backend import Backend
from runtimes.engines.tensorrt import PLAN_FILE

BACKEND = Backend(
    name="tensorrt", file=PLAN_FILE, platforms=("tensorrt_plan",), config_names_platform=True, gpu_only=True
)
