"""Interleaved runs: each engine has a process of its own, and windows alternate, so that noise affects all alike."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.bench import wire
from runtimes.bench.measure import CHECKOUT, Measurement, Sizes, Worker
from runtimes.bench.plan import Point
from runtimes.bench.results import Row, arrivals, head_of, measured
from runtimes.errors import EngineError, MissingPackage
from runtimes.host.memory_sampler import Sampler
from runtimes.runtime import serving_engine
from runtimes.triton.server import TritonServer


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """An artifact to measure, and how it is opened, by which checkout; `served`: by a Triton started for it."""

    artifact: Artifact
    root: Path
    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    served: bool = False
    checkout: Path = CHECKOUT


class Contestant:
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

    @property
    def capacity_per_s(self) -> float | None:
        """Requests a second in a closed loop, from the windows of `result`; None if it has no answer."""
        answered = isinstance(self.result, Measurement) and self.result.samples_s
        return 1 / self.result.run_median_s if answered else None  # type: ignore[union-attr]

    def prepare(self, sizes: Sizes) -> None:
        """The engine is warm at these sizes, and its measurement is empty."""
        if isinstance(self.result, Measurement) and dict(self.result.sizes) == dict(sizes):
            self.result = replace(self.result, windows=[])
        elif self._worker:
            with self._failing():
                self.result = self._worker.prepare(sizes)

    def window(self, load: wire.Request) -> None:
        """Measure one more window, and the peak of memory until its end."""
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
        """Inside, an engine's error becomes the result, and the contestant is measured no further."""
        try:
            yield
        except (EngineError, MissingPackage) as error:
            self.result, self._worker = str(error), None


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """The result of one contestant at one point in one run; `columns` set its row apart from rows of the same sizes."""

    subject: Subject
    scenario: str
    sizes: Sizes
    columns: Row
    result: Measurement | str


class InterleavedRuns:
    """Measures the points of a plan with the engines of one model, run by run."""

    def __init__(self, group: Sequence[Subject], sampler: Sampler, runs: int = 1) -> None:
        self.group = group
        self.sampler = sampler
        self.runs = runs
        self.capacity_per_s: dict[int, float] = {}  # by place; from the first run, so that all runs have the same rates

    def rows(self, plan: Sequence[Point]) -> Iterator[list[Row]]:
        """The rows of each point, all runs in one row; points that share processes come together."""
        for points in sessions(plan):
            runs = [self._run(points) for _ in range(self.runs)]
            for observations in zip(*runs, strict=True):
                yield [joined(of_one) for of_one in zip(*observations, strict=True)]

    def _run(self, points: Sequence[Point]) -> list[list[Observation]]:
        """Open the contestants, measure every point, close them."""
        observed = []
        with ExitStack() as stack:
            contestants = []
            for subject in self.group:
                contestants.append(Contestant(subject, self.sampler))
                stack.callback(contestants[-1].close)
            for point in points:
                self._measure(contestants, point)
                if point.measures_capacity:
                    self._keep_capacities(contestants)
                else:
                    observed.append([self._observe(place, each, point) for place, each in enumerate(contestants)])
        return observed

    def _measure(self, contestants: Sequence[Contestant], point: Point) -> None:
        """Every contestant has had its windows at this point; who is first changes from window to window."""
        for contestant in contestants:
            contestant.prepare(point.sizes)
        places = list(range(len(contestants)))
        for window in range(point.max_windows):
            first = window % len(places)
            for place in places[first:] + places[:first]:
                result = contestants[place].result
                if isinstance(result, Measurement) and (window < point.windows or not result.stable):
                    contestants[place].window(point.load.request(window, self._capacity(place)))

    def _keep_capacities(self, contestants: Sequence[Contestant]) -> None:
        for place, contestant in enumerate(contestants):
            if contestant.capacity_per_s is not None:
                self.capacity_per_s.setdefault(place, contestant.capacity_per_s)

    def _capacity(self, place: int) -> float:
        return self.capacity_per_s.get(place, 1.0)

    def _observe(self, place: int, contestant: Contestant, point: Point) -> Observation:
        return Observation(
            subject=contestant.subject,
            scenario=point.scenario,
            sizes=point.sizes,
            columns=point.load.columns(self._capacity(place)),
            result=contestant.result,
        )


def sessions(plan: Sequence[Point]) -> list[list[Point]]:
    """The points of a plan in groups that share processes."""
    groups: list[list[Point]] = []
    for point in plan:
        if point.new_processes or not groups:
            groups.append([])
        groups[-1].append(point)
    return groups


def joined(observations: Sequence[Observation]) -> Row:
    """One row for several runs of one point; a failed run fails the row, with the reason of the first."""
    first = observations[0]
    device = first.subject.options.get("device", "cpu")
    head = {**head_of(first.subject.artifact, first.subject.label, first.scenario, first.sizes), "device": device}
    head |= first.columns
    runs = [each.result for each in observations if isinstance(each.result, Measurement)]
    if len(runs) < len(observations):
        return {**head, "failed": next(each.result for each in observations if isinstance(each.result, str))}
    if not all(run.samples_s for run in runs):
        remedy = "lower the load, or export it with a longer --queue"
        return {**head, "failed": f"expected answers, found {sum(run.refused for run in runs)} refusals; {remedy}"}
    pooled = replace(runs[0], windows=[window for run in runs for window in run.counted.windows])
    for name in ("load_s", "first_call_s", "warmup_s"):
        setattr(pooled, name, float(np.median([getattr(run, name) for run in runs])))
    pooled.memory = max((run.memory for run in runs), key=lambda peak: peak.memory_bytes)
    extra = arrivals(pooled, head["bound_s"]) if "bound_s" in head else {}
    return {**head, **extra, **measured(pooled, runs)}
