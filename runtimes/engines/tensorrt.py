"""TensorRT and TensorRT-RTX engines on an NVIDIA GPU.

Written against the API that TensorRT 11.4 and TensorRT-RTX 1.7 share. Not run yet: no machine with a GPU that either
accepts was at hand.
"""

from collections.abc import Mapping
from threading import Lock
from typing import Any

import numpy as np

from runtimes.errors import EngineError, require
from runtimes.host.gpu import gpu
from runtimes.runtime import Runtime
from runtimes.tensors import Tensors, TensorSpec

FULL, RTX = "tensorrt", "tensorrt_rtx"
PLAN_FILE = "model.plan"


class TensorRT(Runtime):
    """Runs `model.plan` on one CUDA stream; host arrays are copied in and out."""

    engine = "tensorrt"
    served_by = "triton"
    devices = ("cuda",)
    context: Any = None
    stream_handle: Any = None
    lock: Lock

    def open(self) -> None:
        self.refuse_device()
        if gpu() is None:  # creating a Runtime without a GPU is a segmentation fault in TensorRT 11.4
            raise EngineError(f"{self.artifact.name}: expected an NVIDIA GPU, found none; run it on a machine with one")
        builder = self.artifact.built_with["builder"]
        trt = require(builder, extra="tensorrt-rtx" if builder == RTX else "tensorrt")
        self.cuda = require("cuda.bindings.runtime", extra="tensorrt")
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine((self.root / PLAN_FILE).read_bytes())
        if engine is None:
            raise EngineError(
                f"{self.artifact.name}: {builder} does not accept an engine built for "
                f"{self.artifact.built_with['gpu']} on {gpu()}; export it on this machine"
            )
        self.context = engine.create_execution_context()
        self.stream_handle = self._call(self.cuda.cudaStreamCreate())
        self.buffers: dict[str, tuple[int, int]] = {}
        self.lock = Lock()

    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        with self.lock:  # the context, its stream and its buffers are one set, whichever thread calls
            return self._infer(inputs)

    def _infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:
        to_device = self.cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_host = self.cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        for tensor in self.signature.inputs:
            array = np.ascontiguousarray(inputs[tensor.name])
            address = self._buffer(tensor.name, array.nbytes)
            self._copy(address, array.ctypes.data, array.nbytes, to_device)
            self.context.set_input_shape(tensor.name, array.shape)
        outputs = {tensor.name: self._output(tensor) for tensor in self.signature.outputs}
        if not self.context.execute_async_v3(self.stream_handle):
            raise EngineError(f"{self.artifact.name}: TensorRT could not run; its log above has the reason")
        for name, array in outputs.items():
            self._copy(array.ctypes.data, self.buffers[name][0], array.nbytes, to_host)
        self._call(self.cuda.cudaStreamSynchronize(self.stream_handle))
        return outputs

    def close(self) -> None:
        if self.stream_handle is None:
            return
        for address, _ in self.buffers.values():
            self._call(self.cuda.cudaFree(address))
        self._call(self.cuda.cudaStreamDestroy(self.stream_handle))
        self.context = self.stream_handle = None

    @property
    def cuda_stream(self) -> int | None:
        return None if self.stream_handle is None else int(self.stream_handle)

    @property
    def provider(self) -> str:
        return f"{self.artifact.built_with['builder']} on {gpu()}"

    def _output(self, tensor: TensorSpec) -> np.ndarray:
        array = np.empty(tuple(self.context.get_tensor_shape(tensor.name)), tensor.dtype)
        self._buffer(tensor.name, array.nbytes)
        return array

    def _buffer(self, name: str, size: int) -> int:
        """The address of this tensor's device memory, grown to `size` bytes and registered with the context."""
        address, capacity = self.buffers.get(name, (0, 0))
        if capacity < size:
            if address:
                self._call(self.cuda.cudaFree(address))
            address, capacity = self._call(self.cuda.cudaMalloc(size)), size
            self.buffers[name] = (address, capacity)
        self.context.set_tensor_address(name, address)
        return address

    def _copy(self, target: int, source: int, size: int, kind: Any) -> None:
        self._call(self.cuda.cudaMemcpyAsync(target, source, size, kind, self.stream_handle))

    def _call(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status) != 0:
            raise EngineError(f"{self.artifact.name}: expected success of a CUDA call, found status {status}")
        return values[0] if values else None


def numpy_dtype(trt: Any, dtype: Any) -> str:
    """The NumPy name of a TensorRT data type."""
    return np.dtype(trt.nptype(dtype)).name


RUNTIME = TensorRT
