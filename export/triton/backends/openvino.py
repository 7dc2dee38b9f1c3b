"""Triton's backend for OpenVINO."""

from export.triton.backend import Backend
from runtimes.engines.openvino import MODEL_FILE

BACKEND = Backend(name="openvino", file=MODEL_FILE)
