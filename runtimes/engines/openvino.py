"""OpenVINO on CPU: the fastest engine for batches there (benchmarks/)."""

from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np

from runtimes.errors import EngineError, one_line, require
from runtimes.runtime import Backend, Runtime
from runtimes.tensors import Tensors

MODEL_FILE = "model.xml"


class OpenVinoRuntime(Runtime):
    """Runs `model.xml` for the shortest time of one call."""

    engine = "openvino"
    served_by = "triton"
    backend = Backend(proxy="engine")
    devices = ("cpu",)
    compiled: Any = None
    request: Any = None
    lock: Lock

    def open(self) -> None:
        openvino = require("openvino", extra="openvino")
        self.refuse_device()
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": "f32",  # else a CPU with bfloat16 computes in it
        }
        try:
            model = openvino.Core().read_model(self.root / MODEL_FILE)
            self.compiled = openvino.Core().compile_model(model, "CPU", settings)
            self.request = self.compiled.create_infer_request()
            self.lock = Lock()
        except openvino_errors() as error:
            raise EngineError(f"openvino cannot open {self.root / MODEL_FILE}: {one_line(error)}") from error

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        with self.lock:  # the outputs lie in the request's memory: the next call, of any thread, overwrites them
            try:
                answered = self.request.infer(dict(inputs), share_inputs=True)
            except RuntimeError as error:
                raise EngineError(f"openvino failed on {self.artifact.name}: {one_line(error)}") from error
            return {tensor.name: answered[tensor.name].copy() for tensor in self.signature.outputs}

    def close(self) -> None:
        self.request = self.compiled = None

    @property
    def provider(self) -> str:
        return " ".join(self.compiled.get_property("EXECUTION_DEVICES")) if self.compiled else "not open"


def openvino_errors() -> tuple[type[Exception], ...]:
    """The exceptions of OpenVINO; failures of its frontends are no RuntimeError."""
    frontend = require("openvino.frontend", extra="openvino")
    return (RuntimeError, *(getattr(frontend, name) for name in dir(frontend) if name.endswith("Failure")))


RUNTIME = OpenVinoRuntime
