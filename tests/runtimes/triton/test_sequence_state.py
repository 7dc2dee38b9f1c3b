"""The state of a sequence is kept from its start to its end, or until it is idle for too long."""

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.triton.sequence_state import SequenceMemory
from tests import toys


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_sequence_begins_at_zero_and_keeps_what_it_is_told() -> None:
    memory = SequenceMemory(toys.RUNNING, idle_s=1)
    memory.begin("a")
    np.testing.assert_array_equal(memory.state("a")["h"], np.zeros((1, toys.WIDTH), np.float32))
    memory.keep("a", {"h": np.ones((1, toys.WIDTH), np.float32)})
    memory.begin("b")
    assert memory.state("a")["h"].all()
    memory.begin("a")
    assert not memory.state("a")["h"].any()


def test_an_ended_or_unknown_sequence_is_refused() -> None:
    memory = SequenceMemory(toys.RUNNING, idle_s=1)
    memory.begin(7)
    memory.end(7)
    memory.end(7)
    with pytest.raises(InputError, match="expected a sequence that was started, found id 7; start it again"):
        memory.state(7)


def test_only_sequences_idle_for_too_long_are_forgotten() -> None:
    clock = Clock()
    memory = SequenceMemory(toys.RUNNING, idle_s=10, clock=clock)
    for name in "abc":
        memory.begin(name)
    clock.now = 8
    memory.keep("a", memory.state("a"))
    clock.now = 11
    memory.evict()
    assert len(memory) == 1
    assert memory.state("a")
