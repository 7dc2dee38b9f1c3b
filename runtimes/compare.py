"""Is NEW slower than BASE, by more than this machine's own noise? python -m runtimes.compare BASE NEW

BASE and NEW are both folders, measured here and now in turns: a model repository, or a checkout whose own code then
runs its own model_repository. Or both are results files of `runtimes.bench --runs 5` or more.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from runtimes.artifact import write_json
from runtimes.bench.interleave import Subject
from runtimes.bench.measure import Measurement, Worker, worker_module
from runtimes.bench.results import KEYS, Row, load_results, name_of, run_medians, sizes_text
from runtimes.bench.statistics import FEWEST_RUNS, Difference, paired_difference, unpaired_difference
from runtimes.bench.suite import choose, request_sizes
from runtimes.errors import EngineError, InputError
from runtimes.host.cli import command, parser, table
from runtimes.host.environment import environment
from runtimes.runtime import DEVICES

SCHEMA = "slipway.compare/1"
CLOCKS = ("wall", "cpu")
WINDOWS = 3  # of each process in a round


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One comparison: who, at which sizes, and how NEW differs from BASE or why that is not known."""

    model: str
    engine: str
    sizes: str
    runs: int
    difference: Difference | None
    verdict: str
    reason: str = ""


@command
def main(argv: list[str] | None = None) -> int:
    """Print one line a cell; status 1 if a cell is slower past floor and threshold, or cannot be measured in NEW."""
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
        raise InputError(f"expected a cell that {arguments.base} and {arguments.new} share, found none")
    result = {"schema": SCHEMA, "environment": found, "threshold": threshold, "clock": arguments.clock}
    result["cells"] = [asdict(cell) for cell in cells]
    if arguments.out:
        write_json(arguments.out, result)
    print(json.dumps(result) if arguments.json else cell_table(cells, threshold))
    return int(any(cell.verdict in ("slower", "failed") for cell in cells))


def compare_rows(base: Sequence[Row], new: Sequence[Row], threshold: float, clock: str) -> Iterator[Cell]:
    """The cells of two results files. What is in BASE and no longer in NEW has failed."""
    there = {_key(row): row for row in new}
    for row in base:
        other = there.get(_key(row))
        if "failed" in row or "rate_per_s" in row:  # each engine has its own rates
            continue
        head = {"model": row["model"], "engine": name_of(row), "sizes": f"{row['scenario']} {sizes_text(row)}"}
        if other is None or "failed" in other:
            reason = other["failed"] if other else "not in NEW"
            yield Cell(**head, runs=0, difference=None, verdict="failed", reason=reason)
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
    """The cells that both folders have, each measured in turns; what only BASE has is failed."""
    sides = [{_name(subject): subject for subject in _subjects(folder, arguments)} for folder in (base, new)]
    for name, subject in (bar := tqdm(sides[0].items(), disable=not sys.stderr.isatty(), leave=False)):
        bar.set_description(" ".join(name))
        sizes = (
            request_sizes(subject.artifact) if arguments.sizes == "request" else subject.artifact.signature.sizes("opt")
        )
        text = " ".join(f"{axis}={size}" for axis, size in sizes.items())
        head = {"model": name[0], "engine": " ".join(name[1:]).replace(" fp32", ""), "sizes": text}
        if name not in sides[1]:
            yield Cell(**head, runs=0, difference=None, verdict="failed", reason="not in NEW")
            continue
        try:
            medians = interleaved((subject, subject, sides[1][name]), sizes, arguments)
        except EngineError as error:
            yield Cell(**head, runs=0, difference=None, verdict="failed", reason=str(error))
            continue
        difference = paired_difference(*medians)
        yield Cell(**head, runs=arguments.runs, difference=difference, verdict=difference.verdict(threshold))


def interleaved(arms: Sequence[Subject], sizes: Mapping[str, int], arguments: Any) -> np.ndarray:
    """One figure for each arm and run, in seconds, float64 [arms, runs].

    Every run starts a new process for each arm; within it they take turns window by window, in a random order.
    """
    rng = np.random.default_rng(0)
    figures = np.empty((len(arms), arguments.runs))
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
                    measurement.windows.append(worker.window({"do": "one_by_one", "seconds": arguments.seconds}))
            for arm, (_, measurement) in measurements.items():
                figures[arm, run] = figure_of(measurement, arguments.clock)
    return figures


def figure_of(measurement: Measurement, clock: str) -> float:
    """What a run comes to, in seconds."""
    if clock == "wall":
        return measurement.run_median_s
    if measurement.cpu_s_per_call is None:
        raise EngineError(
            f"--clock cpu: expected an engine in its own process, {measurement.engine} works in another one"
        )
    return measurement.cpu_s_per_call


def cell_table(cells: Sequence[Cell], threshold: float) -> str:
    """The cells as text: by how much NEW is slower, the interval, and the noise floor; negative is faster."""
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
    """The artifacts of a repository, or of a checkout that runs them by its own code."""
    own_code = worker_module(folder) is not None
    repository = folder / "model_repository" if own_code else folder
    if not repository.is_dir():
        raise InputError(f"expected published artifacts in {repository}, found nothing; run python -m export.all there")
    options = {"device": arguments.device, "threads": arguments.threads}
    for subject in choose(repository, arguments.model, arguments.target, options):
        if subject.label == "torch.compile" or (arguments.target and subject.artifact.target not in arguments.target):
            continue
        yield replace(subject, checkout=folder.absolute()) if own_code else subject


def _name(subject: Subject) -> tuple[str, str, str]:
    return subject.artifact.model, subject.label, subject.artifact.precision


def _key(row: Row) -> str:
    return json.dumps([*(row[key] for key in KEYS), row.get("lanes")], sort_keys=True)


def _parser() -> Any:
    result = parser(
        "runtimes.compare",
        "Is NEW slower than BASE, by more than this machine's own noise?",
        "../main . --model policy_gru --target onnx",
        "base.json new.json --fail-slower 5",
    )
    result.add_argument("base", type=Path, metavar="BASE", help="a model repository, a checkout, or a results file")
    result.add_argument("new", type=Path, metavar="NEW", help="another of the same kind")
    result.add_argument("--model", action="append", default=[], help="one model (default: all in both)")
    result.add_argument("--target", action="append", default=[], help="one target (default: all)")
    result.add_argument("--sizes", choices=("request", "opt"), default="request", help="one request, or the opt sizes")
    result.add_argument("--runs", type=int, default=10, help="rounds of new processes (default: 10)")
    result.add_argument("--seconds", type=float, default=0.3, help="length of a window (default: 0.3)")
    result.add_argument("--clock", choices=CLOCKS, default="wall",
                        help="wall: latency; cpu: CPU time of a call, where others use the machine")  # fmt: skip
    result.add_argument("--fail-slower", type=float, default=0.0, metavar="PERCENT", help="tolerate this much")
    result.add_argument("--device", choices=DEVICES, default="cpu",
                        help="where engines run that can run there (default: cpu)")  # fmt: skip
    result.add_argument("--threads", type=int, default=1, help="threads of each engine (default: 1)")
    result.add_argument("--out", type=Path, help="write the comparison to this file")
    result.add_argument("--json", action="store_true", help="print JSON only")
    return result


if __name__ == "__main__":
    sys.exit(main())
