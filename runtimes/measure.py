"""Measures one engine in a process of its own, in blocks, so that engines can take turns on a noisy machine."""

import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.base import Runtime, open_runtime
from runtimes.errors import EngineError, SlipwayError, one_line
from runtimes.pipeline import open_pipeline
from runtimes.tensors import BATCH, Tensors

WARMUP_S, WARMUP_CALLS = 0.2, 10
STABLE_BLOCKS, STABLE_SPREAD = 3, 0.10
# The smallest n for which the largest sample bounds the percentile at 99 % confidence: ln 0.01 / ln p.
SAMPLES_FOR = {50: 7, 90: 44, 95: 90, 99: 459}
CLOSE_TIMEOUT_S = 2
START_TIMEOUT_S = 600  # torch.compile may take minutes


@dataclass(kw_only=True, slots=True)
class Measurement:
    """What one engine did at one size. Times in seconds; `latency_s` holds every sample, block by block."""

    engine: str
    provider: str
    sizes: Mapping[str, int]
    load_s: float
    first_call_s: float
    warmup_s: float
    memory_bytes: int = 0
    latency_s: list[list[float]] = field(default_factory=list)

    @property
    def samples_s(self) -> list[float]:
        return [sample for block in self.latency_s for sample in block]

    @property
    def rows_per_s(self) -> float:
        """Rows of the batch over the time spent in calls."""
        samples = self.samples_s
        return self.sizes[BATCH] * len(samples) / sum(samples)

    @property
    def stable(self) -> bool:
        """Whether the medians of the last blocks lie within STABLE_SPREAD of each other."""
        medians = [float(np.median(block)) for block in self.latency_s[-STABLE_BLOCKS:]]
        return len(medians) == STABLE_BLOCKS and max(medians) <= (1 + STABLE_SPREAD) * min(medians)


def percentile(samples_s: list[float], p: int) -> float | None:
    """The p-th percentile of pooled raw samples, or None where there are too few to speak of it."""
    return float(np.percentile(samples_s, p)) if len(samples_s) >= SAMPLES_FOR[p] else None


def example_feeds(runtime: Runtime, sizes: Mapping[str, int]) -> Tensors:
    """The pipeline's example request as tensors, repeated along every axis to these sizes."""
    pipeline = open_pipeline(runtime.artifact, runtime.root)
    arrays = pipeline.encode([pipeline.example()])
    feeds = {}
    for tensor in runtime.signature.free_inputs:
        array = arrays[tensor.name]
        for axis, size in enumerate(tensor.resolve(sizes)):
            array = np.take(array, np.arange(size) % array.shape[axis], axis)
        feeds[tensor.name] = np.ascontiguousarray(array)
    return feeds


def prepare(runtime: Runtime, sizes: Mapping[str, int]) -> Callable[[], Any]:
    """One call as a user makes it: the next step of a stream where time is 1, else a whole piece from a fresh state."""
    feeds = example_feeds(runtime, sizes)
    if runtime.artifact.signature.state and sizes.get("time") == 1:
        stream = runtime.stream(sizes[BATCH])
        return lambda: stream.step(feeds)
    return lambda: runtime.fresh(feeds)


class Worker:
    """A child process that holds one open engine; `measure_block` lets it run while the others wait.

    `EngineError` when the engine cannot open, answers too late or dies; the process is gone then.
    """

    def __init__(self, root: Path, sizes: Mapping[str, int], options: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        self._process = context.Process(target=_serve, args=(child, root, dict(sizes), dict(options)), daemon=True)
        self._process.start()
        child.close()
        self.measurement: Measurement = self._receive(START_TIMEOUT_S)

    def measure_block(self, seconds: float) -> None:
        """Add one block of samples that takes about this long, and the memory at its end."""
        try:
            self._pipe.send(seconds)
        except OSError as error:
            raise self._died() from error
        block, self.measurement.memory_bytes = self._receive(START_TIMEOUT_S + seconds)
        self.measurement.latency_s.append(block)

    def close(self) -> None:
        """End the process: at its next command it sees that nobody is there; one that computes on is killed."""
        self._pipe.close()
        self._process.join(CLOSE_TIMEOUT_S)
        self._process.kill()
        self._process.join()

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                self.close()
                raise EngineError(f"expected an answer within {timeout_s:g} s, found none")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise self._died() from error
        if isinstance(answer, str):
            self.close()
            raise EngineError(answer)
        return answer

    def _died(self) -> EngineError:
        """The error for a process that is gone; it is waited for, so that no zombie stays."""
        self._process.join(1)
        status = self._process.exitcode
        self.close()
        return EngineError(f"the engine's process died with status {status}")


def _serve(pipe: Connection, root: Path, sizes: dict[str, int], options: dict[str, Any]) -> None:
    try:
        started = time.perf_counter()
        with open_runtime(root, **options) as runtime:
            loaded = time.perf_counter()
            call = prepare(runtime, sizes)
            first_s = _timed(call)
            warmup_s, calls = 0.0, 0
            while warmup_s < WARMUP_S or calls < WARMUP_CALLS:
                warmup_s, calls = warmup_s + _timed(call), calls + 1
            pipe.send(
                Measurement(
                    engine=runtime.engine,
                    provider=runtime.provider,
                    sizes=sizes,
                    load_s=loaded - started,
                    first_call_s=first_s,
                    warmup_s=warmup_s,
                )
            )
            _answer_blocks(pipe, call)
    except SlipwayError as error:
        pipe.send(one_line(error))
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        # torch.compile raises what it likes for a program it cannot compile: that engine's row says so.
        pipe.send(f"{type(error).__name__}: {one_line(error, 160)}")


def _answer_blocks(pipe: Connection, call: Callable[[], Any]) -> None:
    while True:
        try:
            seconds = pipe.recv()
        except EOFError:
            return
        block: list[float] = []
        until = time.perf_counter() + seconds
        while not block or time.perf_counter() < until:
            block.append(_timed(call))
        pipe.send((block, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def _timed(call: Callable[[], Any]) -> float:
    started = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - started) * 1e-9
