"""Queue of a model that makes its own batches: Triton passes it every request at once and queues none."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from runtimes.errors import Overloaded

WAITING = 64  # without a limit in the config
SIZE, TIMEOUT_MS = "max_queue_size", "queue_timeout_ms"  # parameters in the model's config
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """At most `size` requests wait, and none for longer than `timeout_s`; 0 is no limit.

    The errors use the phrases of Triton's batcher, by which a client recognizes a busy server.
    """

    size: int = WAITING
    timeout_s: float = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Limits":
        """The limits in the parameters of a model's config, as Triton passes it to the model."""
        parameters = config.get("parameters", {})
        size, timeout_ms = (int(parameters.get(name, {}).get("string_value", 0)) for name in (SIZE, TIMEOUT_MS))
        return cls(size=size or WAITING, timeout_s=timeout_ms / 1000)

    def too_many(self) -> Overloaded:
        return Overloaded(f"expected fewer than {self.size} requests waiting, found the maximum queue size reached")

    def passed(self, arrived_s: float) -> bool:
        """Whether a request that arrived at this time of the monotonic clock has waited too long."""
        return 0 < self.timeout_s < time.monotonic() - arrived_s

    def too_late(self) -> Overloaded:
        return Overloaded(f"expected to begin within {self.timeout_s:g} s, found no room: timeout expired")


class RequestQueue(Generic[T]):
    """First in, first out, within the limits; safe for threads that put and get."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.closed = False
        self._waiting: deque[tuple[float, T]] = deque()
        self._changed = threading.Condition()

    def put(self, one: T, free: int = 0) -> None:
        """Append a request; `Overloaded` if more than `size` wait beyond the `free` places of the model."""
        with self._changed:
            if len(self._waiting) >= self.limits.size + free:
                raise self.limits.too_many()
            self._waiting.append((time.monotonic(), one))
            self._changed.notify()

    def get(self, *, block: bool = False) -> T | None:
        """The next request; None if none waits, or with `block` once the queue is closed."""
        with self._changed:
            while block and not self._waiting and not self.closed:
                self._changed.wait()
            return self._waiting.popleft()[1] if self._waiting else None

    def overdue(self) -> list[T]:
        """The requests that have waited too long, which are removed."""
        with self._changed:
            late = []
            while self._waiting and self.limits.passed(self._waiting[0][0]):
                late.append(self._waiting.popleft()[1])
            return late

    def close(self) -> None:
        """Calls of `get` that wait return."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
