"""Engines that take turns: each in a process of its own, one window after the other, so that noise hits all alike."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.bench.measure import CHECKOUT, Measurement, Sizes, Worker
from runtimes.bench.results import Row, arrivals, head_of, measured
from runtimes.bench.statistics import STEADY_WINDOWS
from runtimes.errors import EngineError, MissingPackage
from runtimes.host.memory_sampler import Sampler
from runtimes.runtime import serving_engine
from runtimes.triton.server import TritonServer

Load = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Who is measured: an artifact, how it is opened and by which checkout; `served` by a Triton started for it."""

    artifact: Artifact
    root: Path
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    served: bool = False
    checkout: Path = CHECKOUT


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How long and how often.

    rounds       windows of every engine at every size; points of a sweep take a third of them
    most_rounds  windows of an engine that is not yet stable
    runs         whole repetitions, each with new processes
    rates        of arrivals, per second; empty: shares of what each engine can take
    bound_s      the latency within which an answer is good
    lanes        requests in flight, for the concurrency sweep
    """

    seconds: float = 0.2
    rounds: int = 10
    most_rounds: int = 30
    runs: int = 1
    rates: Sequence[float] = ()
    bound_s: float = 0.1
    lanes: Sequence[int] = (1, 2, 4, 8, 16)

    def sweep(self) -> "Settings":
        rounds, most = (max(STEADY_WINDOWS, n // 3) for n in (self.rounds, self.most_rounds))
        return replace(self, rounds=rounds, most_rounds=most)


class Entrant:
    """A subject with its process, and its server if it needs one; `result` is its measurement, or why there is none."""

    def __init__(self, subject: Subject, sampler: Sampler) -> None:
        self.subject = subject
        self.sampler = sampler
        self.watched = 0
        self.result: Measurement | str = "not prepared"
        self._worker: Worker | None = None
        self._closing = ExitStack()
        with self._failing():
            self._open()

    def prepare(self, sizes: Sizes) -> None:
        """Warm at these sizes, with an empty measurement."""
        if isinstance(self.result, Measurement) and dict(self.result.sizes) == dict(sizes):
            self.result = replace(self.result, windows=[])
        elif self._worker:
            with self._failing():
                self.result = self._worker.prepare(sizes)

    def window(self, load: Load) -> None:
        """One more window, and the peak of memory until its end."""
        if self._worker and isinstance(self.result, Measurement):
            with self._failing():
                self.result.windows.append(self._worker.window(load))
                self.result.memory = self.sampler.peak(self.watched)

    def close(self) -> None:
        if self.watched:
            self.sampler.forget(self.watched)
        self._closing.close()

    def _open(self) -> None:
        subject, options = self.subject, dict(self.subject.options)
        if subject.served:
            server = TritonServer(subject.root.parents[1], models=[subject.artifact.name])
            self._closing.enter_context(server)
            options = {"engine": serving_engine(subject.artifact), "url": server.grpc_url}
        self._worker = Worker(subject.root, options, subject.checkout)
        self._closing.callback(self._worker.close)
        self.watched = server.pid if subject.served else self._worker.pid
        self.sampler.watch(self.watched)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Inside, an engine's error becomes the result, and the entrant takes no further turn."""
        try:
            yield
        except (EngineError, MissingPackage) as error:
            self.result, self._worker = str(error), None


@dataclass(kw_only=True, slots=True)
class Taken:
    """What an entrant did at one point of a scenario; `more` sets the point apart from others of the same sizes."""

    subject: Subject
    scenario: str
    sizes: Sizes
    more: Row
    result: Measurement | str


class Turns:
    """One scenario of one model: opens its engines and lets them take turns, run by run."""

    def __init__(self, group: Sequence[Subject], sampler: Sampler, settings: Settings) -> None:
        self.group = group
        self.artifact = group[0].artifact
        self.sampler = sampler
        self.settings = settings

    def run(self, points: Callable[[Sequence[Entrant]], Iterator[list[Taken]]]) -> list[list[Row]]:
        """Rows by point: what `points` takes from the opened engines, all runs in one."""
        runs = []
        for _ in range(self.settings.runs):
            with ExitStack() as stack:
                entrants = []
                for subject in self.group:
                    entrants.append(Entrant(subject, self.sampler))
                    stack.callback(entrants[-1].close)
                runs.append(list(points(entrants)))
        return [[joined(taken) for taken in zip(*point, strict=True)] for point in zip(*runs, strict=True)]

    def point(self, entrants: Sequence[Entrant], sizes: Sizes, loads: Callable[[int, int], Load]) -> None:
        """Every engine is warm at these sizes and has had its windows; `loads` is asked for (entrant, window)."""
        for entrant in entrants:
            entrant.prepare(sizes)
        places = list(range(len(entrants)))
        for turn in range(self.settings.most_rounds):
            first = turn % len(places)
            for place in places[first:] + places[:first]:
                result = entrants[place].result
                if isinstance(result, Measurement) and (turn < self.settings.rounds or not result.stable):
                    entrants[place].window(loads(place, turn))


def always(load: Load) -> Callable[[int, int], Load]:
    """The same load for every entrant and window."""
    return lambda place, turn: load


def joined(taken: Sequence[Taken]) -> Row:
    """One row for several runs of one point; the first failure is that of all."""
    first = taken[0]
    device = first.subject.options.get("device", "cpu")
    head = {**head_of(first.subject.artifact, first.subject.label, first.scenario, first.sizes), "device": device}
    head |= first.more
    runs = [each.result for each in taken if isinstance(each.result, Measurement)]
    if len(runs) < len(taken):
        return {**head, "failed": next(each.result for each in taken if isinstance(each.result, str))}
    if not all(run.samples_s for run in runs):
        remedy = "ask less of it, or export it with a longer --queue"
        return {**head, "failed": f"expected answers, found {sum(run.refused for run in runs)} refusals; {remedy}"}
    whole = replace(runs[0], windows=[window for run in runs for window in run.counted.windows])
    for name in ("load_s", "first_call_s", "warmup_s"):
        setattr(whole, name, float(np.median([getattr(run, name) for run in runs])))
    whole.memory = max((run.memory for run in runs), key=lambda peak: peak.memory_bytes)
    extra = arrivals(whole, head["bound_s"]) if "bound_s" in head else {}
    return {**head, **extra, **measured(whole, runs)}
