"""Test whether NEW is slower than BASE by more than the noise of this machine: python -m runtimes.compare BASE NEW

BASE and NEW are both folders, measured in interleaved runs: a model repository, or a checkout whose own code then runs
its own model_repository. Or both are results files of `runtimes.bench --runs 5` or more.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, write_json
from runtimes.bench import wire
from runtimes.bench.interleave import Subject
from runtimes.bench.measure import Measurement, Sizes, Worker, worker_module
from runtimes.bench.plan import request_sizes
from runtimes.bench.results import COMPARISONS, KEYS, Row, load_results, name_of, run_medians, sizes_text
from runtimes.bench.statistics import FEWEST_RUNS, Difference, paired_difference, unpaired_difference
from runtimes.bench.suite import choose
from runtimes.errors import EngineError, InputError
from runtimes.host.cli import (
    command,
    device_arguments,
    json_argument,
    models_argument,
    parser,
    table,
    target_argument,
)
from runtimes.host.environment import environment
from runtimes.host.progress import progress

SCHEMA = "slipway.compare/1"
CLOCKS = ("wall", "cpu")
WINDOWS = 3  # of each process in a run


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One comparison: an engine at some sizes, the difference of NEW from BASE, or the reason why there is none."""

    model: str
    engine: str
    sizes: str
    runs: int
    difference: Difference | None
    verdict: str
    reason: str = ""


@command
def main(argv: list[str] | None = None) -> int:
    """Print one line for each cell; status 1 if a cell is slower past floor and threshold, or fails in NEW."""
    arguments = _parser().parse_args(argv)
    threshold = arguments.fail_slower / 100
    if not 0 <= threshold < float("inf"):
        raise InputError(f"--fail-slower: expected a percentage of 0 or more, found {arguments.fail_slower}")
    if arguments.runs < FEWEST_RUNS:
        raise InputError(f"--runs: expected {FEWEST_RUNS} or more, found {arguments.runs}")
    found = environment(arguments.threads)
    if arguments.base.is_dir() and arguments.new.is_dir():
        cells = list(compare_folders(arguments.base, arguments.new, threshold, arguments))
    elif arguments.base.is_file() and arguments.new.is_file():
        base, new = (load_results(path) for path in (arguments.base, arguments.new))
        if base["schema"] != new["schema"]:  # their medians are not of the same windows
            raise InputError(f"expected files of one schema, found {base['schema']}, {new['schema']}; measure again")
        cells = list(compare_rows(base["rows"], new["rows"], threshold, arguments.clock))
    else:
        raise InputError(f"expected two folders or two results files, found {arguments.base} and {arguments.new}")
    if not cells:
        raise InputError(
            f"expected a cell in both {arguments.base} and {arguments.new}, found none; measure the same models in both"
        )
    result = {"schema": SCHEMA, "environment": found, "threshold": threshold, "clock": arguments.clock}
    result["cells"] = [asdict(cell) for cell in cells]
    if arguments.out:
        write_json(arguments.out, result)
    print(json.dumps(result) if arguments.json else cell_table(cells, threshold))
    return int(any(cell.verdict in ("slower", "failed") for cell in cells))


def compare_rows(base: Sequence[Row], new: Sequence[Row], threshold: float, clock: str) -> Iterator[Cell]:
    """The cells of two results files. A row of BASE that is not in NEW is a failed cell."""
    in_new = {_key(row): row for row in new}
    for row in base:
        other = in_new.get(_key(row))
        if "failed" in row or "rate_per_s" in row:  # the rates of each engine are its own
            continue
        head = {"model": row["model"], "engine": name_of(row), "sizes": f"{row['scenario']} {sizes_text(row)}"}
        if other is None or "failed" in other:
            yield _failed(head, other["failed"] if other else "not in NEW")
            continue
        if clock == "cpu" and row["cpu_s_per_call"] is None:
            continue
        before, after = (run_medians(each, clock) for each in (row, other))
        runs = min(len(before), len(after))
        if runs < FEWEST_RUNS:
            raise InputError(
                f"expected {FEWEST_RUNS} or more runs of each row, found {runs}; measure with --runs {FEWEST_RUNS}"
            )
        difference = unpaired_difference(before, after)
        yield Cell(**head, runs=runs, difference=difference, verdict=difference.verdict(threshold))


def compare_folders(base: Path, new: Path, threshold: float, arguments: Any) -> Iterator[Cell]:
    """The cells of BASE, each measured in both folders in interleaved runs; one that NEW does not have is failed."""
    base_subjects, new_subjects = (
        {_name(subject): subject for subject in _subjects(folder, arguments)} for folder in (base, new)
    )
    for name, subject in progress(list(base_subjects.items()), "compare"):
        sizes = SIZES[arguments.sizes](subject.artifact)
        text = " ".join(f"{axis}={size}" for axis, size in sizes.items())
        head = {"model": name[0], "engine": " ".join(name[1:]).replace(" fp32", ""), "sizes": text}
        if name not in new_subjects:
            yield _failed(head, "not in NEW")
            continue
        try:
            medians = interleaved((subject, subject, new_subjects[name]), sizes, arguments)
        except EngineError as error:
            yield _failed(head, str(error))
            continue
        difference = paired_difference(*medians)
        yield Cell(**head, runs=arguments.runs, difference=difference, verdict=difference.verdict(threshold))


def interleaved(arms: Sequence[Subject], sizes: Sizes, arguments: Any) -> np.ndarray:
    """One figure for each arm and run, in seconds, float64 [arms, runs].

    Every run starts a new process for each arm; within a run the windows of the arms alternate in a random order.
    """
    rng = np.random.default_rng(0)
    figures = np.empty((len(arms), arguments.runs))
    load = wire.closed_loop(arguments.seconds)
    for run in range(arguments.runs):
        with ExitStack() as stack:
            measurements: dict[int, tuple[Worker, Measurement]] = {}
            for arm in rng.permutation(len(arms)):
                subject = arms[arm]
                worker = Worker(subject.root, subject.options, subject.checkout)
                stack.callback(worker.close)
                measurements[int(arm)] = worker, worker.prepare(sizes)
            for _ in range(WINDOWS):
                for arm in rng.permutation(len(arms)):
                    worker, measurement = measurements[int(arm)]
                    measurement.windows.append(worker.window(load))
            for arm, (_, measurement) in measurements.items():
                figures[arm, run] = figure_of(measurement, arguments.clock)
    return figures


def figure_of(measurement: Measurement, clock: str) -> float:
    """The median latency of a run, or with clock `cpu` the CPU time of a call, in seconds."""
    if clock == "wall":
        return measurement.run_median_s
    if measurement.cpu_s_per_call is None:
        raise EngineError(
            f"--clock cpu: expected an engine in its own process, found {measurement.engine} in another one; "
            "use --clock wall"
        )
    return measurement.cpu_s_per_call


def cell_table(cells: Sequence[Cell], threshold: float) -> str:
    """The cells as text: how much slower NEW is, the interval, and the noise floor; a negative number is faster."""
    lines = []
    for cell in cells:
        found = cell.difference
        figures = ["-"] * 3
        if found:
            shares = (found.slower, found.low, found.high, found.floor)
            slower, low, high, floor = (f"{share:+.1%}" for share in shares)
            figures = [slower, f"{low} .. {high}", floor.lstrip("+")]
        lines.append([cell.model, cell.engine, cell.sizes, cell.runs, *figures, cell.verdict, cell.reason])
    header = ["model", "engine", "sizes", "runs", "slower", "95 % interval", "A/A floor", "verdict", "reason"]
    least = f"\n\nslower: the whole interval lies above the A/A floor and above {threshold:.0%}"
    return table(header, lines) + least


def _subjects(folder: Path, arguments: Any) -> Iterator[Subject]:
    """The artifacts of a repository, or of a checkout, whose own code then runs them."""
    own_code = worker_module(folder) is not None
    repository = folder / "model_repository" if own_code else folder
    if not repository.is_dir():
        raise InputError(f"expected published artifacts in {repository}, found nothing; run python -m export.all there")
    options = {"device": arguments.device, "threads": arguments.threads}
    for subject in choose(repository, arguments.models, arguments.target, options):
        if subject.label in COMPARISONS or (arguments.target and subject.artifact.target not in arguments.target):
            continue
        yield replace(subject, checkout=folder.absolute()) if own_code else subject


def _failed(head: dict[str, str], reason: str) -> Cell:
    return Cell(**head, runs=0, difference=None, verdict="failed", reason=reason)


def _name(subject: Subject) -> tuple[str, str, str]:
    return subject.artifact.model, subject.label, subject.artifact.precision


def _key(row: Row) -> str:
    return json.dumps([*(row[key] for key in KEYS), row.get("lanes")], sort_keys=True)


SIZES: dict[str, Callable[[Artifact], dict[str, int]]] = {
    "request": request_sizes,
    "opt": lambda artifact: artifact.signature.sizes("opt"),
}


def _parser() -> Any:
    result = parser(
        "runtimes.compare",
        "Tests whether NEW is slower than BASE by more than the noise of this machine.",
        "../main . policy_gru --target onnx",
        "base.json new.json --fail-slower 5",
    )
    result.add_argument("base", type=Path, metavar="BASE", help="a model repository, a checkout, or a results file")
    result.add_argument("new", type=Path, metavar="NEW", help="another of the same kind")
    models_argument(result, "models of two folders to compare (default: all in both)")
    target_argument(result, "targets of two folders to compare (default: all)")
    result.add_argument(
        "--sizes",
        choices=SIZES,
        default="request",
        help="request: one request; opt: the opt sizes (default: %(default)s)",
    )
    result.add_argument("--runs", type=int, default=10, help="runs with new processes (default: %(default)s)")
    result.add_argument("--seconds", type=float, default=0.3, help="length of a window (default: %(default)s)")
    result.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="wall: latency; cpu: CPU time of a call, where other processes use the machine (default: %(default)s)",
    )
    result.add_argument(
        "--fail-slower",
        type=float,
        default=0.0,
        metavar="PERCENT",
        help="tolerate a slowdown up to PERCENT (default: %(default)g)",
    )
    device_arguments(result)
    result.add_argument("--out", type=Path, help="write the comparison to this file (default: none)")
    json_argument(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
