"""Holds one open engine and runs what `runtimes.bench.measure` requests: python -m runtimes.bench.worker DESCRIPTOR

It speaks JSON lines over a socket it inherits, so that it may run in another environment or another checkout.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bench.cuda_timer import DeviceTimer
from runtimes.bench.load import Call, Window, arriving, one_by_one, poisson_arrivals, side_by_side
from runtimes.errors import FOREIGN, EngineError, SlipwayError, error_text
from runtimes.pipeline import open_pipeline
from runtimes.runtime import Runtime, open_runtime
from runtimes.tensors import BATCH, Tensors

PROTOCOL = 1
WARMUP_S, WARMUP_CALLS = 0.2, 10
SERVER_LANES = 32  # requests in flight at most, when arrivals are sent to a server


class Bench:
    """One open engine at one size; the methods are what can be asked for, their results what is answered."""

    def __init__(self, runtime: Runtime, load_s: float) -> None:
        self.runtime = runtime
        self.load_s = load_s
        self.sizes: dict[str, int] = {}
        self.calls: list[Call] = []  # one for each lane, each with a state of its own

    def opened(self) -> dict[str, Any]:
        runtime = self.runtime
        return {"engine": runtime.engine, "remote": runtime.remote, "load_s": self.load_s, "protocol": PROTOCOL}

    def prepare(self, sizes: dict[str, int]) -> dict[str, Any]:
        """The first call at these sizes, and warm-up by time and by count."""
        self.sizes, self.calls = sizes, [prepare(self.runtime, sizes)]
        first_s, warmup_s, calls = _timed(self.calls[0]), 0.0, 0
        while warmup_s < WARMUP_S or calls < WARMUP_CALLS:
            warmup_s, calls = warmup_s + _timed(self.calls[0]), calls + 1
        check_device(self.runtime)
        return {
            "provider": self.runtime.provider,
            "first_call_s": first_s,
            "warmup_s": warmup_s,
            "warmup_calls": calls,
        }

    def one_by_one(self, seconds: float) -> dict[str, Any]:
        if self._timer is None:
            return one_by_one(self.calls[0], seconds).to_json()
        return one_by_one(self._timer.around(self.calls[0]), seconds, self._timer.elapsed_s).to_json()

    @cached_property
    def _timer(self) -> DeviceTimer | None:
        stream = self.runtime.cuda_stream
        return None if stream is None else DeviceTimer(stream)

    def side_by_side(self, lanes: int, seconds: float) -> dict[str, Any]:
        return side_by_side(self._lanes(lanes), seconds).to_json()

    def arriving(self, rate_per_s: float, seconds: float, seed: list[int]) -> dict[str, Any]:
        remote = self.runtime.remote
        times = poisson_arrivals(rate_per_s, seconds, seed)
        window: Window = arriving(self._lanes(SERVER_LANES if remote else 1), times, queued=not remote)
        window.rate_per_s = rate_per_s
        return window.to_json()

    def _lanes(self, count: int) -> list[Call]:
        """Calls for lanes that do not know each other; a new one is made once, and called once before it counts."""
        while len(self.calls) < count:
            self.calls.append(prepare(self.runtime, self.sizes))
            self.calls[-1]()
        return self.calls[:count]


def example_inputs(runtime: Runtime, sizes: Mapping[str, int]) -> Tensors:
    """The pipeline's example request as tensors, repeated along every axis to these sizes."""
    pipeline = open_pipeline(runtime.artifact, runtime.root)
    arrays = pipeline.encode([pipeline.example()])
    inputs = {}
    for tensor in runtime.artifact.signature.free_inputs:
        array = arrays[tensor.name]
        for axis, size in enumerate(tensor.resolve(sizes)):
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
        inputs[tensor.name] = np.ascontiguousarray(array)
    return inputs


def prepare(runtime: Runtime, sizes: Mapping[str, int]) -> Call:
    """One call as a user makes it: the next step of a stream, or where time is not 1 a piece from a fresh state."""
    inputs = example_inputs(runtime, sizes)
    if runtime.artifact.signature.state and sizes.get("time", 1) == 1:
        stream = runtime.stream(sizes[BATCH])
        return lambda: stream.step(inputs)
    return runtime.repeated(inputs)


def check_device(runtime: Runtime) -> None:
    """`EngineError` if an engine that was asked for a GPU says that something else computes."""
    if runtime.device == "cuda" and not runtime.remote and "cpu" in runtime.provider.lower():
        raise EngineError(f"{runtime.artifact.name}: expected an engine on cuda, found {runtime.provider}")


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) * 1e-9


def main() -> None:
    """Open what the first line names, then answer line by line until the other end is closed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with socket.socket(fileno=int(sys.argv[1])) as pipe, pipe.makefile("r") as questions:
        try:
            for answer in _answers(questions):
                pipe.sendall(json.dumps({"ok": answer}).encode() + b"\n")
        except BrokenPipeError:
            pass  # whoever asked is gone
        except (SlipwayError, *FOREIGN) as error:  # torch.compile raises what it likes: that engine's row says so
            _say(pipe, error_text(error))


def _say(pipe: socket.socket, error: str) -> None:
    pipe.sendall(json.dumps({"error": error}).encode() + b"\n")


def _answers(questions: Any) -> Iterator[dict[str, Any]]:
    opening = json.loads(next(questions))
    started = time.perf_counter()
    with open_runtime(Path(opening["root"]), **opening["options"]) as runtime:
        bench = Bench(runtime, time.perf_counter() - started)
        yield bench.opened()
        for line in questions:
            question = json.loads(line)
            yield getattr(bench, question.pop("do"))(**question)


if __name__ == "__main__":
    main()
