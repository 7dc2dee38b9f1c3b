"""The recurrent state of many sequences, by id, for a server that computes one step per request."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable

from runtimes.errors import InputError
from runtimes.tensors import Signature, Tensors


class SequenceMemory:
    """Keeps one row of state per sequence until it ends or is idle for longer than `idle_s`."""

    def __init__(self, signature: Signature, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.signature = signature
        self.idle_s = idle_s
        self.clock = clock
        self._states: OrderedDict[Hashable, tuple[float, Tensors]] = OrderedDict()  # the longest idle first

    def __len__(self) -> int:
        return len(self._states)

    def begin(self, sequence: Hashable) -> None:
        """The sequence starts, or starts again, with a state of zero."""
        self.keep(sequence, self.signature.zero_state(1))

    def state(self, sequence: Hashable) -> Tensors:
        """Inputs that carry the state, each [1, ...]; `InputError` for an unknown sequence."""
        if sequence not in self._states:
            raise InputError(f"expected a sequence that was started, found id {sequence}; start it again")
        return self._states[sequence][1]

    def keep(self, sequence: Hashable, state: Tensors) -> None:
        self._states[sequence] = (self.clock(), state)
        self._states.move_to_end(sequence)

    def end(self, sequence: Hashable) -> None:
        self._states.pop(sequence, None)

    def evict(self) -> None:
        """Remove every sequence that has been idle for too long: its client is gone."""
        oldest = self.clock() - self.idle_s
        while self._states and next(iter(self._states.values()))[0] < oldest:
            self._states.popitem(last=False)
