"""Measure published artifacts beside torch, eager and compiled, in interleaved runs: python -m runtimes.bench"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtimes.artifact import Artifact
from runtimes.bench.interleave import Subject
from runtimes.bench.load import SCENARIOS
from runtimes.bench.plan import CAPACITY_SHARES, Settings
from runtimes.bench.results import COMPARISONS, SCHEMA, Row, failed_artifacts, row_table, save_results
from runtimes.bench.suite import choose, has_baseline, measure
from runtimes.errors import InputError
from runtimes.host.cli import (
    command,
    device_arguments,
    existing_folder,
    hidden_alias,
    json_argument,
    models_argument,
    parser,
    repository_argument,
    target_argument,
    unknown_name,
)
from runtimes.host.environment import environment
from runtimes.repository import published

PUBLISH = "publish it: python -m export.all {} --target onnx,torch"


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print one table, and with --out keep every sample; status 1 if an artifact failed."""
    arguments = _parser().parse_args(argv)
    settings = settings_of(arguments)
    for path in filter(None, (arguments.out, arguments.summary)):
        existing_folder(path.absolute().parent, "room for the results")
    subjects = subjects_of(arguments)
    warn_without_baseline(subjects)
    found = environment(arguments.threads)  # before the measurement: its load is that of other processes
    scenarios = SCENARIOS if "all" in arguments.scenario else arguments.scenario or SCENARIOS[:1]
    rows: list[Row] = []
    try:
        rows.extend(measure(subjects, scenarios, settings))
    finally:  # an interruption keeps the rows that were measured before it
        if arguments.out:
            save_results(arguments.out, found, rows)
        if arguments.summary:
            save_results(arguments.summary, found, rows, samples=False)
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "environment": found, "rows": rows}))
    else:
        print(row_table(rows))
    return int(bool(failed_artifacts(rows)))


def subjects_of(arguments: Any) -> list[Subject]:
    """The subjects that the command line names; `InputError` if a model has none, or none is left."""
    repository = existing_folder(arguments.repository, "published artifacts")
    known = {Artifact.load(root).model for root in published(repository)}
    for model in arguments.models:
        if model not in known:
            raise unknown_name("published model", model, known, PUBLISH.format(model))
    options = {"device": arguments.device, "threads": arguments.threads}
    subjects = list(choose(repository, arguments.models, arguments.target, options, arguments.triton))
    if arguments.no_compile:
        subjects = [subject for subject in subjects if subject.label not in COMPARISONS]
    if not subjects:
        raise InputError(
            f"expected artifacts that answer in one run on this machine in {repository}, found none; "
            f"{PUBLISH.format('MODEL')}"
        )
    return subjects


def warn_without_baseline(subjects: Sequence[Subject]) -> None:
    """Print each model that is measured without torch eager of the same checkpoint."""
    artifacts = [subject.artifact for subject in subjects]
    for model in sorted({each.model for each in artifacts if not has_baseline(each, subjects)}):
        remedy = f"python -m export.all {model} --target torch"
        print(
            f"{model}: expected torch eager of the same checkpoint, found none; publish it: {remedy}", file=sys.stderr
        )


def settings_of(arguments: Any) -> Settings:
    """The settings on the command line; `InputError` for a value out of range."""
    if arguments.windows < 1 or not arguments.seconds >= 0:
        raise InputError(
            f"expected 1 or more windows of 0 or more seconds, found {arguments.windows}, {arguments.seconds}"
        )
    for name, values in (("--runs", [arguments.runs]), ("--concurrency", arguments.concurrency or [1])):
        if min(values) < 1:
            raise InputError(f"{name}: expected 1 or more, found {min(values)}")
    for name, values in (("--rate", arguments.rate or [1]), ("--slo-ms", [arguments.slo_ms])):
        if not all(0 < value < float("inf") for value in values):
            raise InputError(f"{name}: expected a number above 0, found {min(values)}")
    return Settings(
        seconds=arguments.seconds,
        windows=arguments.windows,
        max_windows=max(arguments.windows, arguments.max_windows or 3 * arguments.windows),
        runs=arguments.runs,
        rates=tuple(arguments.rate),
        slo_s=arguments.slo_ms * 1e-3,
        concurrency=tuple(arguments.concurrency) or Settings().concurrency,
    )


def _parser() -> Any:
    result = parser(
        "runtimes.bench",
        __doc__.partition(":")[0] + ".",
        "policy_mamba",
        "policy_gru --scenario all --triton --out results.json",
    )
    models_argument(result, "models to measure (default: all that are published)")
    target_argument(result, "targets to measure beside torch (default: all)")
    result.add_argument(
        "--scenario",
        action="append",
        default=[],
        choices=(*SCENARIOS, "all"),
        help=f"load: {', '.join(SCENARIOS)} or all; repeat for several (default: {SCENARIOS[0]})",
    )
    repository_argument(result)
    device_arguments(result)
    _add_load(result)
    result.add_argument(
        "--no-compile",
        action="store_true",
        help="leave out torch.compile, whose start takes minutes (default: measure it)",
    )
    result.add_argument(
        "--triton", action="store_true", help="measure also through a Triton started for each artifact (default: no)"
    )
    result.add_argument("--out", type=Path, help="write the results, with every sample, to this file (default: none)")
    result.add_argument("--summary", type=Path, help="write the results without samples to this file (default: none)")
    json_argument(result)
    return result


def _add_load(result: Any) -> None:
    default = Settings()
    result.add_argument(
        "--seconds", type=float, default=default.seconds, help="length of a window (default: %(default)s)"
    )
    result.add_argument(
        "--windows",
        type=int,
        default=default.windows,
        help="windows of each engine at each point (default: %(default)s)",
    )
    result.add_argument(
        "--max-windows", type=int, help="windows of an engine that is not yet stable, at most (default: 3 x --windows)"
    )
    result.add_argument(
        "--runs", type=int, default=default.runs, help="repetitions in new processes (default: %(default)s)"
    )
    shares = " and ".join(f"{share:.0%}".replace("%", " %%") for share in CAPACITY_SHARES)
    result.add_argument(
        "--rate",
        type=float,
        action="append",
        default=[],
        help=f"server: arrivals a second; repeat for several (default: {shares} of an engine's capacity)",
    )
    result.add_argument(
        "--slo-ms",
        type=float,
        default=default.slo_s * 1e3,
        help="server: latency within which an answer counts for goodput (default: %(default)g)",
    )
    in_flight = " ".join(map(str, default.concurrency))
    result.add_argument(
        "--concurrency",
        type=int,
        action="append",
        default=[],
        help=f"concurrency: requests in flight; repeat for several (default: {in_flight})",
    )
    for old, new in (("--rounds", "--windows"), ("--most-rounds", "--max-windows"), ("--bound-ms", "--slo-ms"),
                     ("--lanes", "--concurrency")):  # fmt: skip
        hidden_alias(result, old, new)


if __name__ == "__main__":
    sys.exit(main())
