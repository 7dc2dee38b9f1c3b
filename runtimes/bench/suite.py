"""The benchmark suite: which artifacts are measured, and the rows of all scenarios."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.bench.interleave import InterleavedRuns, Subject
from runtimes.bench.load import SCENARIOS
from runtimes.bench.plan import PLANS, Settings
from runtimes.bench.results import BASELINE, COMPILED, Row, counted_samples
from runtimes.bench.statistics import knee
from runtimes.host.memory_sampler import Sampler
from runtimes.host.progress import Progress
from runtimes.pipeline import all_pipelines
from runtimes.repository import artifacts_root, published
from runtimes.runtime import device_for


def choose(
    repository: Path, models: Sequence[str], targets: Sequence[str], options: Mapping[str, Any], served: bool = False
) -> Iterator[Subject]:
    """The newest artifact of every model and target that was run where it was made; torch also compiled.

    An artifact that generates is left out: its time depends on the request. An engine with one device is measured on
    that device. With `served`, artifacts that Triton can serve appear once more, through Triton.
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
            yield replace(subject, label=COMPILED, options={**own, "compiled": True})
        if served and root.is_relative_to(artifacts_root(repository, True)):
            yield replace(subject, label="triton", served=True)


def generates(artifact: Artifact) -> bool:
    """Whether an artifact answers a request by many runs of its engine."""
    pipeline = all_pipelines().get(artifact.pipeline)
    return pipeline is not None and bool(pipeline.generates)


def has_baseline(artifact: Artifact, subjects: Sequence[Subject]) -> bool:
    """Whether torch eager in fp32 of the same checkpoint is among the subjects."""
    eager = [each.artifact for each in subjects if (each.label, each.artifact.precision) == (BASELINE, "fp32")]
    return (artifact.model, artifact.checkpoint) in ((each.model, each.checkpoint) for each in eager)


def measure(subjects: Sequence[Subject], scenarios: Sequence[str], settings: Settings) -> Iterator[Row]:
    """Rows in the published schema; the runs of the engines of a model are interleaved window by window."""
    groups: dict[str, list[Subject]] = {}
    for subject in subjects:
        groups.setdefault(subject.artifact.model, []).append(subject)
    jobs = [(group, name) for group in groups.values() for name in SCENARIOS if name in scenarios]
    with Sampler() as sampler, Progress("benchmark", len(jobs)) as bar:
        for group, name in jobs:
            artifact = group[0].artifact
            bar.describe(f"{artifact.model} {name}")
            by_point = InterleavedRuns(group, sampler, settings.runs).rows(PLANS[name](artifact, settings))
            for rows in with_knees(by_point) if name == "concurrency" else by_point:
                yield from rows
            bar.advance()


def with_knees(by_point: Iterator[list[Row]]) -> list[list[Row]]:
    """The rows by point of a concurrency sweep, with the knee of each engine marked."""
    points = list(by_point)
    for sweep in zip(*points, strict=True):  # of one engine
        mark_knee(sweep)
    return points


def mark_knee(sweep: Sequence[Row]) -> None:
    """Exactly one of the rows of an engine's sweep has `knee` true; none of a sweep with a failed row."""
    if not any("failed" in row for row in sweep):
        chosen = knee([(row["rows_per_s"], float(np.mean(counted_samples(row)))) for row in sweep])
        for i, row in enumerate(sweep):
            row["knee"] = i == chosen
