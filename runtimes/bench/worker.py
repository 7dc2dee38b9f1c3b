"""Holds one open engine and runs what `runtimes.bench.measure` requests: python -m runtimes.bench.worker DESCRIPTOR

It exchanges JSON lines (runtimes.bench.wire) over an inherited socket, so that it may run in another environment or
another checkout.
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

from runtimes.bench import wire
from runtimes.bench.cuda_timer import DeviceTimer
from runtimes.bench.load import Call, Window, closed_loop, concurrent, open_loop, poisson_arrivals
from runtimes.errors import FOREIGN, EngineError, SlipwayError, error_text
from runtimes.pipeline import open_pipeline
from runtimes.runtime import Runtime, open_runtime
from runtimes.tensors import BATCH, Tensors

WARMUP_S, WARMUP_CALLS = 0.2, 10
MAX_IN_FLIGHT = 32  # requests, when arrivals are sent to a server


class Bench:
    """One open engine at one size; `ACTS` has its method for each word of the protocol."""

    def __init__(self, runtime: Runtime, load_s: float) -> None:
        self.runtime = runtime
        self.load_s = load_s
        self.sizes: dict[str, int] = {}
        self.calls: list[Call] = []  # one for each concurrent request, each with a state of its own

    def opened(self) -> dict[str, Any]:
        runtime = self.runtime
        return {"engine": runtime.engine, "remote": runtime.remote, "load_s": self.load_s, "protocol": wire.PROTOCOL}

    def prepare(self, sizes: dict[str, int]) -> dict[str, Any]:
        """Make the first call at these sizes, then warm up for WARMUP_S and WARMUP_CALLS at least."""
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

    def closed_loop(self, seconds: float) -> dict[str, Any]:
        if self._timer is None:
            return closed_loop(self.calls[0], seconds).to_json()
        return closed_loop(self._timer.around(self.calls[0]), seconds, self._timer.elapsed_s).to_json()

    @cached_property
    def _timer(self) -> DeviceTimer | None:
        stream = self.runtime.cuda_stream
        return None if stream is None else DeviceTimer(stream)

    def concurrent(self, lanes: int, seconds: float) -> dict[str, Any]:
        return concurrent(self._independent_calls(lanes), seconds).to_json()

    def open_loop(self, rate_per_s: float, seconds: float, seed: list[int]) -> dict[str, Any]:
        remote = self.runtime.remote
        times = poisson_arrivals(rate_per_s, seconds, seed)
        calls = self._independent_calls(MAX_IN_FLIGHT if remote else 1)
        window: Window = open_loop(calls, times, queued=not remote)
        window.rate_per_s = rate_per_s
        return window.to_json()

    def _independent_calls(self, count: int) -> list[Call]:
        """Calls that share no state; a new one is called once before it is measured."""
        while len(self.calls) < count:
            self.calls.append(prepare(self.runtime, self.sizes))
            self.calls[-1]()
        return self.calls[:count]


ACTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    wire.PREPARE: Bench.prepare,
    wire.CLOSED_LOOP: Bench.closed_loop,
    wire.CONCURRENT: Bench.concurrent,
    wire.OPEN_LOOP: Bench.open_loop,
}


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
    """One call as a user makes it: the next step of a stream where time is 1, else a run from a fresh state."""
    inputs = example_inputs(runtime, sizes)
    if runtime.artifact.signature.state and sizes.get("time", 1) == 1:
        stream = runtime.stream(sizes[BATCH])
        return lambda: stream.step(inputs)
    return runtime.repeated(inputs)


def check_device(runtime: Runtime) -> None:
    """`EngineError` if an engine that was opened on a GPU reports another device."""
    if runtime.device == "cuda" and not runtime.remote and "cpu" in runtime.provider.lower():
        found = f"found {runtime.provider}; use --device cpu"
        raise EngineError(f"{runtime.artifact.name}: expected an engine on cuda, {found}")


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) * 1e-9


def main() -> None:
    """Open the artifact of the first request, then answer each request until the other end is closed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with socket.socket(fileno=int(sys.argv[1])) as pipe, pipe.makefile("r") as requests:
        try:
            for answer in _answers(requests):
                pipe.sendall(json.dumps({"ok": answer}).encode() + b"\n")
        except BrokenPipeError:
            pass  # the other process has ended
        except (SlipwayError, *FOREIGN) as error:  # torch.compile raises many kinds; the error is the result of its row
            pipe.sendall(json.dumps({"error": error_text(error)}).encode() + b"\n")


def _answers(requests: Any) -> Iterator[dict[str, Any]]:
    opening = json.loads(next(requests))
    started = time.perf_counter()
    with open_runtime(Path(opening["root"]), **opening["options"]) as runtime:
        bench = Bench(runtime, time.perf_counter() - started)
        yield bench.opened()
        for line in requests:
            request = json.loads(line)
            yield ACTS[request.pop(wire.DO)](bench, **request)


if __name__ == "__main__":
    main()
