"""Load a real server with valid and invalid requests, and check every answer and its memory: python -m runtimes.soak"""

import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.bench.load import LATE_S, concurrent, poisson_arrivals, posting
from runtimes.bench.results import milliseconds
from runtimes.bench.statistics import knee, percentile
from runtimes.errors import EngineError, InputError, Overloaded
from runtimes.host.cli import (
    command,
    existing_folder,
    hidden_alias,
    json_argument,
    models_argument,
    parser,
    repository_argument,
    table,
    unknown_name,
)
from runtimes.host.memory_sampler import tree
from runtimes.host.progress import Progress
from runtimes.pipeline import open_pipeline
from runtimes.repository import artifacts_root, published
from runtimes.triton.client import CLIENTS, Answer, TritonClient, new_sequence
from runtimes.triton.server import TritonServer

CONCURRENCY = (1, 2, 4, 8, 16)  # requests in flight, in the search for the knee
KNEE_S = 2.0
INVALID = (b"{", b"\xff", b"null", b"[]", b'{"text": 7}', b'{"frames": [[1, 2]]}', b'{"turns": []}', b"[" * 5000)
INVALID_SHARE = 0.2
CORRECT, BUSY, REJECTED = "valid, answered correctly", "refused, too many", "invalid, rejected"
WRONG, FAILED, ACCEPTED, BROKEN = "valid, wrong answer", "valid, failed", "invalid, answered", "invalid, failed"
FAULTS = (WRONG, FAILED, ACCEPTED, BROKEN)
OUTCOMES = (CORRECT, BUSY, REJECTED, *FAULTS)
TOLERANCE = 1e-4
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(kw_only=True, slots=True)
class Tally:
    """The seconds of each request by outcome; several threads add to it."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {outcome: [] for outcome in OUTCOMES})

    def add(self, outcome: str, seconds: float) -> None:
        self.seconds[outcome].append(seconds)

    @property
    def counts(self) -> dict[str, int]:
        return {outcome: len(times) for outcome, times in self.seconds.items() if times}


class CheckedRequest:
    """A valid request to an ensemble with its expected answer: the answer while no other request is in flight."""

    def __init__(self, client: TritonClient, model: str, request: bytes) -> None:
        self.client, self.model, self.request = client, model, request
        self.alone = self.answer(request)
        self.expected = json.loads(self.alone)

    def send(self, tally: Tally) -> None:
        """Send the request and count its outcome."""
        started = time.perf_counter()
        outcome = self.outcome(lambda: self.answer(self.request))
        tally.add(outcome, time.perf_counter() - started)

    def outcome(self, answer: Callable[[], bytes]) -> str:
        """The outcome of the valid request with this answer."""
        try:
            found = answer()
            return CORRECT if found == self.alone or alike(json.loads(found), self.expected) else WRONG
        except Overloaded:
            return BUSY
        except (InputError, EngineError):
            return FAILED
        except ValueError:  # no JSON
            return WRONG

    def send_invalid(self, tally: Tally, request: bytes) -> None:
        """Send an invalid request, and count whether the server rejects it as invalid."""
        started = time.perf_counter()
        try:
            self.answer(request)
            outcome = ACCEPTED
        except InputError:
            outcome = REJECTED
        except Overloaded:
            outcome = BUSY
        except EngineError:
            outcome = BROKEN
        tally.add(outcome, time.perf_counter() - started)

    def answer(self, request: bytes) -> bytes:
        """The answer of the ensemble; `InputError` where it rejects the request."""
        return only_answer(self.client.send(*self._arguments(request), **whole_sequence()))

    def post(self, then: Callable[[str], object]) -> None:
        """Send the valid request without waiting; `then` receives its outcome."""

        def answered(answer: Answer) -> None:
            then(self.outcome(partial(only_answer, answer)))

        self.client.post(*self._arguments(self.request), answered, **whole_sequence())

    def _arguments(self, request: bytes) -> tuple[str, dict[str, np.ndarray], list[str]]:
        return self.model, {"request": np.array([[request]], np.object_)}, ["answer"]


def only_answer(wait: Answer) -> bytes:
    """Wait for the answer of an ensemble; its JSON."""
    answer: bytes = wait()["answer"].item()
    return answer


def whole_sequence() -> dict[str, Any]:
    """For a recurrent model: a sequence of this request alone."""
    return {"sequence_id": new_sequence(), "sequence_start": True, "sequence_end": True}


def alike(answer: Any, expected: Any) -> bool:
    """Whether two answers are equal within TOLERANCE: other requests of a batch change the last digits of numbers."""
    if isinstance(answer, float) and isinstance(expected, float):
        return math.isclose(answer, expected, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(answer, dict) and isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(alike(answer[name], expected[name]) for name in answer)
    if isinstance(answer, list) and isinstance(expected, list):
        return len(answer) == len(expected) and all(map(alike, answer, expected))
    return bool(answer == expected)


class Memory:
    """Resident bytes of a server and its processes, sampled in a thread twice a second."""

    def __init__(self, server: TritonServer) -> None:
        self.server, self.samples = server, list[int]()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.samples.append(sum(map(resident, tree(self.server.pid))))

    def growth(self) -> tuple[float, float]:
        """MB after the first tenth of the time, and the growth until the last tenth: both medians."""
        tenth = max(1, len(self.samples) // 10)
        early, late = np.median(self.samples[tenth : 2 * tenth]), np.median(self.samples[-tenth:])
        return float(early) / 1e6, float(late - early) / 1e6


def resident(process: int) -> int:
    """Bytes of resident memory; 0 for a process that has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


@command
def main(argv: list[str] | None = None) -> int:
    """Status 1 if an answer was wrong, a valid request failed, an invalid one was not rejected, or memory grew."""
    arguments = _parser().parse_args(argv)
    max_mb = arguments.max_growth_mb
    if not max_mb >= 0:
        raise InputError(f"--max-growth-mb: expected a number of 0 or more, found {max_mb}")
    repository = existing_folder(arguments.repository, "published artifacts")
    requests = examples(repository, arguments.models)
    if not requests:
        raise InputError(f"expected served models in {repository}, found none; run: python -m export.all --target onnx")
    with TritonServer(repository, poll_s=1, strict=False, log=arguments.log) as server:
        client = CLIENTS["grpc"](server.grpc_url, arguments.timeout_s)
        checked = [CheckedRequest(client, model, request) for model, request in requests.items()]
        with Memory(server) as memory, Progress(f"soak for {arguments.seconds:g} s"):
            if arguments.overload:
                tally, facts = overload(checked[0], arguments.overload, arguments.seconds)
            else:
                tally, facts = soak(checked, arguments.seconds, arguments.concurrency), {}
        client.close()
    early, more = memory.growth()
    facts |= {
        "memory at the start, MB": f"{early:.0f}",
        "memory growth, MB": f"{more:+.1f} of {max_mb:g} allowed",
    }
    print(json.dumps({"counts": tally.counts, **facts}) if arguments.json else report(tally, facts))
    return int(more > max_mb or any(outcome in FAULTS for outcome in tally.counts))


def examples(repository: Path, models: Sequence[str]) -> dict[str, bytes]:
    """The example request of every published ensemble, or of the named ones; `InputError` for an unknown name."""
    found = {}
    for root in published(repository):
        artifact = Artifact.load(root)
        ensemble = (repository / artifact.model / "config.pbtxt").is_file()
        if ensemble and root.is_relative_to(artifacts_root(repository, True)):
            found[artifact.model] = json.dumps(open_pipeline(artifact, root).example()).encode()
    for model in models:
        if model not in found:
            raise unknown_name("served model", model, found, f"publish it: python -m export.all {model} --target onnx")
    return {model: request for model, request in found.items() if not models or model in models}


def soak(checked: Sequence[CheckedRequest], seconds: float, concurrency: int) -> Tally:
    """Requests to the models in rotation, from several clients at once; one in five, at random, is invalid."""
    tally = Tally()
    concurrent([rotation(checked, tally, offset) for offset in range(concurrency)], seconds)
    return tally


def rotation(checked: Sequence[CheckedRequest], tally: Tally, offset: int) -> Callable[[], None]:
    """A call that sends one request to the next model, the first at `offset`."""
    order = itertools.islice(itertools.cycle(range(len(checked))), offset, None)
    rng = np.random.default_rng(offset)  # a fixed period could match the rotation, and one model get no valid request

    def call() -> None:
        request = checked[next(order)]
        if rng.random() < INVALID_SHARE:
            request.send_invalid(tally, INVALID[rng.integers(len(INVALID))])
        else:
            request.send(tally)

    return call


def overload(checked: CheckedRequest, factor: float, seconds: float) -> tuple[Tally, dict[str, str]]:
    """Arrivals at `factor` times the throughput at the knee, in an open loop.

    Times count from the intended time of sending. The facts have the times from the real sending as well, because a
    machine that also runs the server may send late.
    """
    in_flight, knee_per_s = find_knee(checked)
    arrivals = poisson_arrivals(factor * knee_per_s, seconds, [0])
    outcomes = [FAILED] * len(arrivals)

    def post(i: int, done: Callable[[], None]) -> None:
        def then(outcome: str) -> None:
            outcomes[i] = outcome
            done()

        checked.post(then)

    window = posting(post, arrivals)
    tally, since_sent = Tally(), Tally()
    for outcome, latency_s, service_s in zip(outcomes, window.samples_s, window.service_s, strict=True):
        tally.add(outcome, latency_s)
        since_sent.add(outcome, service_s)
    late_s = np.subtract(window.samples_s, window.service_s).tolist()
    return tally, {
        "model": checked.model,
        "requests a second at the knee": f"{knee_per_s:.0f}, {in_flight} in flight",
        "sent a second": f"{len(arrivals) / seconds:.0f}",
        "answered correctly a second": f"{len(tally.seconds[CORRECT]) / window.wall_s:.0f}",
        "sent late": f"{window.late / len(arrivals):.0%} by more than {LATE_S * 1e3:g} ms, {spread(late_s)}",
        **{f"{outcome}, since sending": spread(times) for outcome, times in since_sent.seconds.items() if times},
    }


def spread(times_s: Sequence[float]) -> str:
    """Median and 99th percentile as text."""
    median, p99 = np.percentile(times_s, [50, 99]) * 1e3
    return f"p50 {median:.1f} ms, p99 {p99:.1f} ms"


def find_knee(checked: CheckedRequest) -> tuple[int, float]:
    """(requests in flight, correct answers a second) at the knee."""
    rates = []
    for in_flight in CONCURRENCY:
        tally = Tally()
        window = concurrent([partial(checked.send, tally)] * in_flight, KNEE_S)
        correct = tally.seconds[CORRECT]
        if not correct:
            raise EngineError(f"expected correct answers from {checked.model}, found {tally.counts}; see --log")
        rates.append((len(correct) / window.wall_s, float(np.median(correct))))
    best = knee(rates)
    return CONCURRENCY[best], rates[best][0]


def report(tally: Tally, facts: dict[str, str]) -> str:
    """The outcomes with their times as a table, then the facts."""
    rows = []
    for outcome, count in tally.counts.items():
        times = tally.seconds[outcome]
        figures = (percentile(times, 50), percentile(times, 99), max(times))
        rows.append((outcome, count, *(milliseconds(each, 1) for each in figures)))
    lines = [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join([table(["requests", "count", "p50 ms", "p99 ms", "max ms"], rows), "", *lines])


def _parser() -> Any:
    result = parser(
        "runtimes.soak",
        __doc__.partition(": python")[0] + ".",
        "--seconds 600",
        "strategy --overload 2 --seconds 60",
    )
    models_argument(result, "models to load (default: every published ensemble)")
    repository_argument(result)
    result.add_argument("--seconds", type=float, default=600, help="duration (default: %(default)s)")
    result.add_argument("--concurrency", type=int, default=4, help="clients at once (default: %(default)s)")
    result.add_argument(
        "--overload",
        type=float,
        metavar="FACTOR",
        help="send FACTOR times the throughput at the knee, to the first model (default: no)",
    )
    result.add_argument("--timeout-s", type=float, default=5, help="deadline of a request (default: %(default)s)")
    result.add_argument(
        "--max-growth-mb",
        type=float,
        default=100.0,
        metavar="MB",
        help="memory that the server may gain after the first tenth (default: %(default)s)",
    )
    result.add_argument("--log", type=Path, help="write the log of the server to this file (default: none)")
    json_argument(result)
    hidden_alias(result, "--lanes", "--concurrency")
    hidden_alias(result, "--most-growth-mb", "--max-growth-mb")
    return result


if __name__ == "__main__":
    sys.exit(main())
