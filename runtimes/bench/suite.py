"""The benchmark suite: who is measured, at which sizes, and what each scenario does."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtimes.artifact import Artifact
from runtimes.bench.interleave import Entrant, Load, Settings, Subject, Taken, Turns, always
from runtimes.bench.load import SCENARIOS
from runtimes.bench.measure import Measurement, Sizes
from runtimes.bench.results import BASELINE, Row, counted_samples
from runtimes.bench.statistics import knee
from runtimes.host.memory_sampler import Sampler
from runtimes.pipeline import all_pipelines
from runtimes.repository import artifacts_root, published
from runtimes.runtime import device_for
from runtimes.tensors import BATCH

OWN_RATES = (0.5, 0.8)  # shares of what an engine can take one by one
ARRIVALS = 30  # in a window of the server scenario, at least


def choose(
    repository: Path, models: Sequence[str], targets: Sequence[str], options: Mapping[str, Any], served: bool = False
) -> Iterator[Subject]:
    """The newest artifact of every model and target that was run where it was made; torch also compiled.

    One that generates is left out: how long it takes is up to the request. An engine that has one device only is
    measured on that. With `served`, artifacts that Triton can serve once more through it.
    """
    for root in published(repository):
        artifact = Artifact.load(root)
        wanted = (not models or artifact.model in models) and (not targets or artifact.target in (*targets, BASELINE))
        if not wanted or not artifact.facts.ran or generates(artifact):
            continue
        own = {**options, "device": device_for(artifact.runtime, options["device"])}
        subject = Subject(artifact=artifact, root=root, label=artifact.target, options=own)
        yield subject
        if artifact.target == BASELINE:
            yield replace(subject, label="torch.compile", options={**own, "compiled": True})
        if served and root.is_relative_to(artifacts_root(repository, True)):
            yield replace(subject, label="triton", served=True)


def generates(artifact: Artifact) -> bool:
    """Whether an artifact answers by many runs of its engine."""
    pipeline = all_pipelines().get(artifact.pipeline)
    return pipeline is not None and bool(pipeline.generates)


def has_baseline(artifact: Artifact, subjects: Sequence[Subject]) -> bool:
    """Whether torch eager in fp32 of the same checkpoint is measured beside this artifact."""
    eager = [each.artifact for each in subjects if (each.label, each.artifact.precision) == (BASELINE, "fp32")]
    return (artifact.model, artifact.checkpoint) in ((each.model, each.checkpoint) for each in eager)


def measure(subjects: Sequence[Subject], scenarios: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Rows in the published schema: the engines of a model take turns, window by window."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.artifact.model, []).append(subject)
    jobs = [(group, name) for group in groups.values() for name in SCENARIOS if name in scenarios]
    with Sampler() as sampler:
        for group, name in (bar := tqdm(jobs, disable=not sys.stderr.isatty(), leave=False)):
            bar.set_description(f"{group[0].artifact.model} {name}")
            for point in PLANS[name](Turns(group, sampler, settings)):
                yield from point


def request_sizes(artifact: Artifact) -> dict[str, int]:
    """One row: for a recurrent model a single step, else with every other axis at its opt."""
    return {**artifact.signature.sizes("min" if artifact.signature.state else "opt"), BATCH: 1}


def batches(artifact: Artifact) -> list[int]:
    """Powers of two from the smallest batch up, and the largest."""
    axis = artifact.signature.axis(BATCH)
    doubled = [axis.min * 2**i for i in range(axis.max.bit_length())]
    return [*(batch for batch in doubled if batch < axis.max), axis.max]


def single_stream(turns: Turns) -> Iterator[list[Row]]:
    """One request in flight, at the size of a request and at the opt sizes, each in new processes."""
    loads = always(_one_by_one(turns))

    def points(sizes: Sizes, entrants: Sequence[Entrant]) -> Iterator[list[Taken]]:
        turns.point(entrants, sizes, loads)
        yield _taken(entrants, "single-stream", sizes)

    for sizes in (request_sizes(turns.artifact), turns.artifact.signature.sizes("opt")):
        yield from turns.run(partial(points, sizes))


def offline(turns: Turns) -> Iterator[list[Row]]:
    """Throughput at each batch size, in one process each."""
    turns.settings = turns.settings.sweep()
    loads = always(_one_by_one(turns))

    def points(entrants: Sequence[Entrant]) -> Iterator[list[Taken]]:
        for batch in batches(turns.artifact):
            sizes = {**turns.artifact.signature.sizes("opt"), BATCH: batch}
            turns.point(entrants, sizes, loads)
            yield _taken(entrants, "offline", sizes)

    yield from turns.run(points)


def server(turns: Turns) -> Iterator[list[Row]]:
    """Poisson arrivals of single requests, at the given rates or at shares of what each engine can take one by one."""
    settings = turns.settings = turns.settings.sweep()
    sizes = request_sizes(turns.artifact)
    capacity: dict[int, float] = {}  # by place; from the first run, so that all runs have the same rates

    def points(entrants: Sequence[Entrant]) -> Iterator[list[Taken]]:
        for place, entrant in enumerate(entrants):
            entrant.prepare(sizes)
            entrant.window(_one_by_one(turns))
            if isinstance(entrant.result, Measurement) and entrant.result.samples_s:
                capacity.setdefault(place, 1 / entrant.result.run_median_s)
        for share in settings.rates or OWN_RATES:
            rates = [share * (1 if settings.rates else capacity.get(place, 1.0)) for place in range(len(entrants))]
            turns.point(entrants, sizes, partial(_arriving, settings, rates))
            more = [{"rate_per_s": rate, "bound_s": settings.bound_s} for rate in rates]
            yield [_take(entrant, "server", sizes, each) for entrant, each in zip(entrants, more, strict=True)]

    yield from turns.run(points)


def concurrency(turns: Turns) -> Iterator[list[Row]]:
    """More and more requests in flight, in threads of one process or of a client; the knee is marked."""
    settings = turns.settings = turns.settings.sweep()
    sizes = request_sizes(turns.artifact)

    def points(entrants: Sequence[Entrant]) -> Iterator[list[Taken]]:
        for lanes in settings.lanes:
            turns.point(entrants, sizes, always({"do": "side_by_side", "lanes": lanes, "seconds": settings.seconds}))
            yield [_take(entrant, "concurrency", sizes, {"lanes": lanes}) for entrant in entrants]

    by_point = turns.run(points)
    for sweep in zip(*by_point, strict=True):  # of one engine
        mark_knee(sweep)
    yield from by_point


def mark_knee(sweep: Sequence[Row]) -> None:
    """Exactly one of the rows of an engine's sweep has `knee` true; none of a sweep that failed somewhere."""
    if not any("failed" in row for row in sweep):
        chosen = knee([(row["rows_per_s"], float(np.mean(counted_samples(row)))) for row in sweep])
        for i, row in enumerate(sweep):
            row["knee"] = i == chosen


def _one_by_one(turns: Turns) -> Load:
    return {"do": "one_by_one", "seconds": turns.settings.seconds}


def _arriving(settings: Settings, rates: Sequence[float], place: int, turn: int) -> Load:
    """Arrivals of a window: the same for every engine that has the same rate."""
    seconds = max(settings.seconds, ARRIVALS / rates[place])
    return {"do": "arriving", "rate_per_s": rates[place], "seconds": seconds, "seed": [0, turn]}


def _take(entrant: Entrant, scenario: str, sizes: Sizes, more: Row) -> Taken:
    return Taken(subject=entrant.subject, scenario=scenario, sizes=sizes, more=more, result=entrant.result)


def _taken(entrants: Sequence[Entrant], scenario: str, sizes: Sizes) -> list[Taken]:
    return [_take(entrant, scenario, sizes, {}) for entrant in entrants]


PLANS: dict[str, Callable[[Turns], Iterator[list[Row]]]] = dict(
    zip(SCENARIOS, (single_stream, offline, server, concurrency), strict=True)
)
