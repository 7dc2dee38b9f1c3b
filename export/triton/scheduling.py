"""Instances, queues and timeouts of a served model."""

from dataclasses import dataclass

from export.triton.schema import Fields
from runtimes.errors import InputError
from runtimes.triton.request_queue import SIZE, TIMEOUT_MS


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheduling:
    """The instances of a stateless model and of each step around it, and the limits on the requests that wait.

    Requests over a limit are rejected. The steps have limits of their own because an ensemble has none: requests
    collect before its slowest step.

    instances   copies that run in parallel; each copy of a step is a process
    queue       requests that may wait; 0 is unlimited, or 64 for a model with a queue of its own
    timeout_ms  how long a request may wait; 0 is unlimited

    `InputError` for a limit with a single instance: Triton's batcher then sleeps for half a second when a request
    arrives while the instance is busy, and nothing wakes it (triton-inference-server/server#8870; measured with 2.51).
    """

    instances: int = 1
    queue: int = 0
    timeout_ms: int = 0

    def __post_init__(self) -> None:
        if self.instances < 1 or self.queue < 0 or self.timeout_ms < 0:
            raise InputError(f"expected 1 or more instances and limits of 0 or more, found {self}")
        if self.limited and self.instances == 1:
            raise InputError(
                "expected 2 or more --instances with a limit on waiting, found 1: Triton stalls for 500 ms with one"
            )

    @property
    def limited(self) -> bool:
        return bool(self.queue or self.timeout_ms)

    def policy(self) -> Fields:
        """The dynamic batcher's settings; none without a limit."""
        limits: Fields = {"max_queue_size": self.queue} if self.queue else {}
        if self.timeout_ms:
            limits |= {"timeout_action": "REJECT", "default_timeout_microseconds": self.timeout_ms * 1000}
        return {"default_queue_policy": limits} if limits else {}

    def parameters(self) -> dict[str, str]:
        """The parameters of a model with a queue of its own; none where its defaults are the limits."""
        given = {SIZE: self.queue, TIMEOUT_MS: self.timeout_ms}
        return {name: str(value) for name, value in given.items() if value}


UNLIMITED = Scheduling()
