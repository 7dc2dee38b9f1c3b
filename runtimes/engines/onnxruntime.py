"""ONNX Runtime on CPU or CUDA."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

import numpy as np

from runtimes.errors import EngineError, one_line, require
from runtimes.runtime import Backend, CarriedStream, Runtime
from runtimes.tensors import Tensors

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
MODEL_FILE = "model.onnx"


class OnnxRuntime(Runtime):
    """Runs `model.onnx` at ONNX Runtime's highest optimisation level."""

    engine = "onnxruntime"
    served_by = "triton"
    backend = Backend(proxy="engine")
    session: Any = None

    def open(self) -> None:
        ort = require("onnxruntime", extra="onnx")
        self.refuse_device()
        if self.device == "cuda":  # finds CUDA also in torch's packages; it prints the names of missing libraries
            with redirect_stdout(sys.stderr):
                ort.preload_dlls()
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
        # With CUDA requested and no GPU, ONNX Runtime 1.31 silently runs on the CPU.
        if self.provider != wanted:
            raise EngineError(f"onnxruntime: expected {wanted}, it fell back to {self.provider}; use device cpu")

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        names = [tensor.name for tensor in self.signature.outputs]
        return dict(zip(names, self.guarded(lambda: self.session.run(names, dict(inputs))), strict=True))

    def carried(self, batch: int) -> CarriedStream:
        bound = self.device == "cpu" and self.signature.state
        return BoundStream(self, batch) if bound else super().carried(batch)

    def guarded(self, act: Callable[[], Any]) -> Any:
        """The result of the call; `EngineError` if ONNX Runtime fails."""
        try:
            return act()
        except _ort_errors(require("onnxruntime", extra="onnx")) as error:
            raise EngineError(f"onnxruntime failed on {self.artifact.name}: {one_line(error)}") from error

    def close(self) -> None:
        self.session = None

    @property
    def provider(self) -> str:
        return self.session.get_providers()[0] if self.session else "not open"


class BoundStream(CarriedStream):
    """A stream with fixed arrays: ONNX Runtime reads the state from one set and writes it to another.

    The sets swap at every step. A state that the model may write in place is in both, and so never copied.
    """

    runtime: OnnxRuntime

    def __init__(self, runtime: OnnxRuntime, batch: int) -> None:
        super().__init__(runtime, batch)
        self._sizes: dict[str, int] = {}  # of the bound arrays; empty before the first step
        self._inputs: Tensors = {}
        self._visible: Tensors = {}
        self._next: Tensors = {}
        self._bindings: list[Any] = []  # of this step and of the one after it

    def step(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        sizes = self.check(inputs)
        if sizes != self._sizes:
            self._bind(sizes)
        for name, array in self._inputs.items():
            np.copyto(array, inputs[name])
        session, binding = self.runtime.session, self._bindings[0]
        self.runtime.guarded(lambda: session.run_with_iobinding(binding))
        self._bindings.reverse()
        self.state, self._next = self._next, self.state
        return {name: array.copy() for name, array in self._visible.items()}

    def reset(self, rows: Iterable[int]) -> None:
        chosen = list(rows)
        for array in self.state.values():
            array[chosen] = 0

    def choose(self, rows: Sequence[int | None]) -> None:
        super().choose(rows)
        self._sizes = {}

    def _bind(self, sizes: dict[str, int]) -> None:
        signature = self.runtime.signature
        self._inputs = {spec.name: spec.zeros(sizes) for spec in signature.free_inputs}
        self._visible = {spec.name: spec.zeros(sizes) for spec in signature.visible_outputs}
        self._next = signature.zero_state(self.batch) | {name: self.state[name] for name in signature.in_place}
        self._bindings = [self._binding(self.state, self._next), self._binding(self._next, self.state)]
        self._sizes = sizes

    def _binding(self, before: Tensors, after: Tensors) -> Any:
        binding = self.runtime.session.io_binding()
        results = {result: after[source] for source, result in self.runtime.signature.state}
        for arrays, bind in (
            (self._inputs | before, binding.bind_input),
            (self._visible | results, binding.bind_output),
        ):
            for name, array in arrays.items():
                bind(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        return binding


def _ort_errors(ort: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's own exceptions, which share no base narrower than Exception."""
    state = ort.capi.onnxruntime_pybind11_state
    kinds = (getattr(state, name) for name in dir(state))
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Exception))


RUNTIME = OnnxRuntime
