"""Who waits for a model that makes its own batches: Triton hands it every request at once, and has no queue for it."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from runtimes.errors import Overloaded

WAITING = 64  # where the export named no limit
SIZE, TIMEOUT_MS = "max_queue_size", "queue_timeout_ms"  # parameters in the model's config
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """At most `size` requests wait, and none for longer than `timeout_s`; 0 is for ever.

    Whoever is refused is told so in the words of Triton's batcher, by which a client knows that the server is busy.
    """

    size: int = WAITING
    timeout_s: float = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Limits":
        """Those that a model's config, as Triton hands it out, asks for."""
        parameters = config.get("parameters", {})
        size, timeout_ms = (int(parameters.get(name, {}).get("string_value", 0)) for name in (SIZE, TIMEOUT_MS))
        return cls(size=size or WAITING, timeout_s=timeout_ms / 1000)

    def too_many(self) -> Overloaded:
        return Overloaded(f"expected fewer than {self.size} requests waiting, found the maximum queue size reached")

    def passed(self, arrived_s: float) -> bool:
        """Whether who arrived at this time of the monotonic clock has waited too long."""
        return 0 < self.timeout_s < time.monotonic() - arrived_s

    def too_late(self) -> Overloaded:
        return Overloaded(f"expected to begin within {self.timeout_s:g} s, found no room: timeout expired")


class RequestQueue(Generic[T]):
    """First come, first served, within these limits; filled by some threads and emptied by others."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.closed = False
        self._waiting: deque[tuple[float, T]] = deque()
        self._changed = threading.Condition()

    def put(self, one: T, free: int = 0) -> None:
        """Who came waits; `Overloaded` where there is no room beside those for whom `free` places are."""
        with self._changed:
            if len(self._waiting) >= self.limits.size + free:
                raise self.limits.too_many()
            self._waiting.append((time.monotonic(), one))
            self._changed.notify()

    def get(self, *, block: bool = False) -> T | None:
        """The next one; None where nobody waits, or with `block` once the line is closed."""
        with self._changed:
            while block and not self._waiting and not self.closed:
                self._changed.wait()
            return self._waiting.popleft()[1] if self._waiting else None

    def overdue(self) -> list[T]:
        """Those who have waited too long; they wait no more."""
        with self._changed:
            late = []
            while self._waiting and self.limits.passed(self._waiting[0][0]):
                late.append(self._waiting.popleft()[1])
            return late

    def close(self) -> None:
        """Whoever waits in `get` goes on."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()
