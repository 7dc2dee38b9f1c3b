"""ONNX Runtime on CPU or CUDA."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from runtimes.base import Runtime, refuse_device
from runtimes.errors import EngineError, one_line, require
from runtimes.tensors import Tensors

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MODEL_FILE = "model.onnx"


class OnnxRuntime(Runtime):
    """Runs `model.onnx` at ONNX Runtime's highest optimisation level."""

    engine = "onnxruntime"
    session: Any = None

    def open(self) -> None:
        ort = require("onnxruntime", extra="onnx")
        refuse_device(self.engine, self.device, PROVIDERS)
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Spinning threads of several sessions on few cores starve each other.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0" if self.threads == 1 else "1")
        wanted = PROVIDERS[self.device]
        try:
            self.session = ort.InferenceSession(self.root / MODEL_FILE, options, providers=[wanted])
        except _ort_errors(ort) as error:
            raise EngineError(f"onnxruntime cannot open {self.root / MODEL_FILE}: {one_line(error)}") from error
        # Asked for CUDA without a GPU, ONNX Runtime 1.31 says nothing and runs on the CPU.
        if self.provider != wanted:
            raise EngineError(f"onnxruntime: expected {wanted}, it fell back to {self.provider}; use device cpu")

    def infer(self, feeds: Mapping[str, np.ndarray]) -> Tensors:
        names = [tensor.name for tensor in self.signature.outputs]
        try:
            return dict(zip(names, self.session.run(names, dict(feeds)), strict=True))
        except _ort_errors(require("onnxruntime", extra="onnx")) as error:
            raise EngineError(f"onnxruntime failed on {self.artifact.name}: {one_line(error)}") from error

    def close(self) -> None:
        self.session = None

    @property
    def provider(self) -> str:
        return self.session.get_providers()[0] if self.session else "not open"


def _ort_errors(ort: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions, which share no base narrower than Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    kinds = (getattr(state, name) for name in dir(state))
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


RUNTIME = OnnxRuntime
