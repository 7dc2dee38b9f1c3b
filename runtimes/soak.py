"""Leave a real server under load for a while, right and wrong requests mixed, and look at what becomes of it."""

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
from runtimes.bench.load import LATE_S, poisson_arrivals, posting, side_by_side
from runtimes.bench.statistics import knee, percentile
from runtimes.errors import EngineError, InputError, Overloaded
from runtimes.host.cli import command, existing_folder, parser, table
from runtimes.host.memory_sampler import tree
from runtimes.pipeline import open_pipeline
from runtimes.repository import artifacts_root, published
from runtimes.triton.client import CLIENTS, Answer, TritonClient, new_sequence
from runtimes.triton.server import TritonServer

LANES = (1, 2, 4, 8, 16)
KNEE_S = 2.0
WRONG = (b"{", b"\xff", b"null", b"[]", b'{"text": 7}', b'{"frames": [[1, 2]]}', b'{"turns": []}', b"[" * 5000)
WRONG_SHARE = 0.2
RIGHT, BUSY, DECLINED = "answered rightly", "refused, too many", "no request, declined"
WRONGLY, FAILED, TAKEN, BROKEN = "answered wrongly", "failed", "no request, yet answered", "no request, failed"
FAULTS = (WRONGLY, FAILED, TAKEN, BROKEN)
OUTCOMES = (RIGHT, BUSY, DECLINED, *FAULTS)
TOLERANCE = 1e-4
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(kw_only=True, slots=True)
class Tally:
    """What became of the requests to a server, and how many seconds each took; filled by several threads."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {what: [] for what in OUTCOMES})

    def add(self, what: str, seconds: float) -> None:
        self.seconds[what].append(seconds)

    @property
    def counts(self) -> dict[str, int]:
        return {what: len(times) for what, times in self.seconds.items() if times}


class Question:
    """A request to an ensemble whose right answer is known: what it says while nothing else is asked."""

    def __init__(self, client: TritonClient, model: str, request: bytes) -> None:
        self.client, self.model, self.request = client, model, request
        self.answered = self.answer(request)
        self.expected = json.loads(self.answered)

    def ask(self, tally: Tally) -> None:
        """Ask, and count what came of it."""
        started = time.perf_counter()
        what = self.judged(lambda: self.answer(self.request))
        tally.add(what, time.perf_counter() - started)

    def judged(self, answer: Callable[[], bytes]) -> str:
        """What came of a right request with this answer."""
        try:
            found = answer()
            return RIGHT if found == self.answered or alike(json.loads(found), self.expected) else WRONGLY
        except Overloaded:
            return BUSY
        except (InputError, EngineError):
            return FAILED
        except ValueError:  # no JSON
            return WRONGLY

    def ask_wrongly(self, tally: Tally, request: bytes) -> None:
        """Send what is no request of this model, and count whether it is declined as such."""
        started = time.perf_counter()
        try:
            self.answer(request)
            what = TAKEN
        except InputError:
            what = DECLINED
        except Overloaded:
            what = BUSY
        except EngineError:
            what = BROKEN
        tally.add(what, time.perf_counter() - started)

    def answer(self, request: bytes) -> bytes:
        """What the ensemble says to this request; `InputError` where it declines it."""
        return only_answer(self.client.send(*self._asked(request), **whole_sequence()))

    def post(self, then: Callable[[str], object]) -> None:
        """The right request is on its way; `then` will be told what came of it."""

        def told(answer: Answer) -> None:
            then(self.judged(partial(only_answer, answer)))

        self.client.post(*self._asked(self.request), told, **whole_sequence())

    def _asked(self, request: bytes) -> tuple[str, dict[str, np.ndarray], list[str]]:
        return self.model, {"request": np.array([[request]], np.object_)}, ["answer"]


def only_answer(wait: Answer) -> bytes:
    """The JSON of an ensemble's answer, once it is there."""
    answer: bytes = wait()["answer"].item()
    return answer


def whole_sequence() -> dict[str, Any]:
    """For a recurrent model: a sequence of this request alone."""
    return {"sequence_id": new_sequence(), "sequence_start": True, "sequence_end": True}


def alike(answer: Any, expected: Any) -> bool:
    """Whether two answers say the same: a batch that a request was in may have changed the last digits of numbers."""
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
        """MB at the end of the first tenth, and what the last tenth lies above it: both medians."""
        tenth = max(1, len(self.samples) // 10)
        early, late = np.median(self.samples[tenth : 2 * tenth]), np.median(self.samples[-tenth:])
        return float(early) / 1e6, float(late - early) / 1e6


def resident(process: int) -> int:
    """Bytes of resident memory; 0 for a process that has gone."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE_BYTES
    except (FileNotFoundError, ProcessLookupError):
        return 0


@command
def main(argv: list[str] | None = None) -> int:
    """Status 1 if an answer was wrong, a right request failed, a wrong one was answered or failed, or memory grew."""
    arguments = _parser().parse_args(argv)
    most_mb = arguments.most_growth_mb
    if not most_mb >= 0:
        raise InputError(f"--most-growth-mb: expected a number of 0 or more, found {most_mb}")
    repository = existing_folder(arguments.repository, "published artifacts")
    requests = examples(repository, arguments.model)
    if not requests:
        raise InputError(f"expected served models in {repository}, found none; run: python -m export.all --target onnx")
    with TritonServer(repository, poll_s=1, strict=False, log=arguments.log) as server:
        client = CLIENTS["grpc"](server.grpc_url, arguments.timeout_s)
        questions = [Question(client, model, request) for model, request in requests.items()]
        with Memory(server) as memory:
            if arguments.overload:
                tally, facts = overload(questions[0], arguments.overload, arguments.seconds)
            else:
                tally, facts = soak(questions, arguments.seconds, arguments.lanes), {}
        client.close()
    early, more = memory.growth()
    facts |= {
        "memory at first, MB": f"{early:.0f}",
        "memory more at the end, MB": f"{more:+.1f} of {most_mb:g} allowed",
    }
    print(json.dumps({"counts": tally.counts, **facts}) if arguments.json else report(tally, facts))
    return int(more > most_mb or any(what in FAULTS for what in tally.counts))


def examples(repository: Path, models: Sequence[str]) -> dict[str, bytes]:
    """The example request of every ensemble that is published, or of those named."""
    found = {}
    for root in published(repository):
        artifact = Artifact.load(root)
        ensemble = (repository / artifact.model / "config.pbtxt").is_file()
        if (
            ensemble
            and root.is_relative_to(artifacts_root(repository, True))
            and (not models or artifact.model in models)
        ):
            found[artifact.model] = json.dumps(open_pipeline(artifact, root).example()).encode()
    return found


def soak(questions: Sequence[Question], seconds: float, lanes: int) -> Tally:
    """Every model in turn, from several clients at once; by chance one request in five is a wrong one."""
    tally = Tally()
    calls = [lane(questions, tally, offset) for offset in range(lanes)]
    side_by_side(calls, seconds)
    return tally


def lane(questions: Sequence[Question], tally: Tally, offset: int) -> Callable[[], None]:
    turns = itertools.cycle(range(len(questions)))
    turn = itertools.islice(turns, offset, None)
    rng = np.random.default_rng(offset)  # a rhythm could meet that of the turns, and some model hear nothing right

    def call() -> None:
        question = questions[next(turn)]
        if rng.random() < WRONG_SHARE:
            question.ask_wrongly(tally, WRONG[rng.integers(len(WRONG))])
        else:
            question.ask(tally)

    return call


def overload(question: Question, factor: float, seconds: float) -> tuple[Tally, dict[str, str]]:
    """`factor` times as many requests as at the knee, at random times that wait for no answer.

    What an answer took counts from when its request was due; since when it was sent is told apart, for a machine that
    runs the server as well may be late.
    """
    lanes, knee_per_s = find_knee(question)
    arrivals = poisson_arrivals(factor * knee_per_s, seconds, [0])
    outcomes = [FAILED] * len(arrivals)

    def post(i: int, resolve_config: Callable[[], None]) -> None:
        def then(what: str) -> None:
            outcomes[i] = what
            resolve_config()

        question.post(then)

    window = posting(post, arrivals)
    tally, since_sent = Tally(), Tally()
    for what, latency_s, service_s in zip(outcomes, window.samples_s, window.service_s, strict=True):
        tally.add(what, latency_s)
        since_sent.add(what, service_s)
    late_s = np.subtract(window.samples_s, window.service_s).tolist()
    return tally, {
        "model": question.model,
        "requests a second at the knee": f"{knee_per_s:.0f}, {lanes} side by side",
        "sent a second": f"{len(arrivals) / seconds:.0f}",
        "answered rightly a second": f"{len(tally.seconds[RIGHT]) / window.wall_s:.0f}",
        "sent late": f"{window.late / len(arrivals):.0%} by more than {LATE_S * 1e3:g} ms, {spread(late_s)}",
        **{f"{what}, since it was sent": spread(times) for what, times in since_sent.seconds.items() if times},
    }


def spread(times_s: Sequence[float]) -> str:
    """Median and 99th percentile as text."""
    median, most = np.percentile(times_s, [50, 99]) * 1e3
    return f"p50 {median:.1f} ms, p99 {most:.1f} ms"


def find_knee(question: Question) -> tuple[int, float]:
    """How many requests are on their way at the knee, and how many are answered rightly a second there."""
    rates = []
    for lanes in LANES:
        tally = Tally()
        window = side_by_side([partial(question.ask, tally)] * lanes, KNEE_S)
        right = tally.seconds[RIGHT]
        if not right:
            raise EngineError(f"expected right answers from {question.model}, found {tally.counts}")
        rates.append((len(right) / window.wall_s, float(np.median(right))))
    best = knee(rates)
    return LANES[best], rates[best][0]


def report(tally: Tally, facts: dict[str, str]) -> str:
    """What came of the requests, with how long it took."""
    rows = []
    for what, count in tally.counts.items():
        times = [percentile(tally.seconds[what], p) for p in (50, 99)]
        cells = ["-" if time_ is None else f"{time_ * 1e3:.1f}" for time_ in times]
        rows.append((what, count, *cells, f"{max(tally.seconds[what]) * 1e3:.1f}"))
    lines = [f"{name}: {value}" for name, value in facts.items()]
    return "\n".join([table(["requests", "count", "p50 ms", "p99 ms", "most ms"], rows), "", *lines])


def _parser() -> Any:
    result = parser(
        "runtimes.soak",
        __doc__.strip(),
        "--seconds 600",
        "--overload 2 --model strategy --seconds 60",
    )
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--model", action="append", default=[], help="one model (default: every ensemble there is)")
    result.add_argument("--seconds", type=float, default=600, help="how long (default: 600)")
    result.add_argument("--lanes", type=int, default=4, help="clients at once (default: 4)")
    result.add_argument("--overload", type=float, help="send this many times what the knee takes, to the first model")
    result.add_argument("--timeout-s", type=float, default=5, help="deadline of a request (default: 5)")
    result.add_argument("--most-growth-mb", type=float, default=100.0, metavar="MB",
                        help="memory that the server may gain after the first tenth (default: 100)")  # fmt: skip
    result.add_argument("--log", type=Path, help="keep the server's own log in this file")
    result.add_argument("--json", action="store_true", help="print JSON only")
    return result


if __name__ == "__main__":
    sys.exit(main())
