"""Time on the GPU: CUDA events on an engine's own stream, around a call.

Written against cuda-python 13 (cuda.bindings.runtime). Not run yet: no GPU was at hand.
"""

from collections.abc import Callable
from typing import Any

from runtimes.errors import EngineError, require


class DeviceTimer:
    """Two events on one CUDA stream. The time between them is that of the copies in, the kernels and the copies out."""

    def __init__(self, stream: int) -> None:
        self.cuda = require("cuda.bindings.runtime", extra="tensorrt")
        self.stream = stream
        self.before, self.after = (self._call(self.cuda.cudaEventCreate()) for _ in range(2))

    def around(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call, with an event in the stream before and after it; the call waits for neither."""

        def timed() -> Any:
            self._call(self.cuda.cudaEventRecord(self.before, self.stream))
            answer = call()
            self._call(self.cuda.cudaEventRecord(self.after, self.stream))
            return answer

        return timed

    def elapsed_s(self) -> float:
        """Seconds between the events of the last call; waits for the second of them."""
        self._call(self.cuda.cudaEventSynchronize(self.after))
        return float(self._call(self.cuda.cudaEventElapsedTime(self.before, self.after))) * 1e-3

    def _call(self, result: tuple[Any, ...]) -> Any:
        status, *values = result
        if int(status) != 0:
            raise EngineError(f"CUDA events: expected success, found {status}; check the driver with nvidia-smi")
        return values[0] if values else None
