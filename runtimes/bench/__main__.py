"""Measure published artifacts beside torch, eager and compiled, taking turns: python -m runtimes.bench"""

import json
import sys
from pathlib import Path
from typing import Any

from runtimes.bench.interleave import Settings
from runtimes.bench.load import SCENARIOS
from runtimes.bench.results import SCHEMA, Row, row_table, save_results
from runtimes.bench.suite import choose, has_baseline, measure
from runtimes.errors import InputError
from runtimes.host.cli import command, existing_folder, parser
from runtimes.host.environment import environment
from runtimes.runtime import DEVICES


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print one table, and with --out keep every sample; status 1 if a row failed."""
    arguments = _parser().parse_args(argv)
    settings = settings_of(arguments)
    for path in filter(None, (arguments.out, arguments.summary)):
        existing_folder(path.absolute().parent, "room for the results")
    repository = existing_folder(arguments.repository, "published artifacts")
    options = {"device": arguments.device, "threads": arguments.threads}
    subjects = list(choose(repository, arguments.model, arguments.target, options, arguments.triton))
    if arguments.no_compile:
        subjects = [subject for subject in subjects if not subject.options.get("compiled")]
    if not subjects:
        raise InputError(
            f"expected artifacts that answer in one run here in {repository}, found none; run python -m export.all"
        )
    artifacts = [subject.artifact for subject in subjects]
    for model in sorted({each.model for each in artifacts if not has_baseline(each, subjects)}):
        remedy = f"python -m export.all --target torch --model {model}"
        print(f"no torch eager of the same checkpoint beside {model}; make one: {remedy}", file=sys.stderr)
    found = environment(arguments.threads)  # before: the load is that of the others
    scenarios = SCENARIOS if "all" in arguments.scenario else arguments.scenario or SCENARIOS[:1]
    rows: list[Row] = []
    try:
        rows.extend(measure(subjects, scenarios, settings))
    finally:  # also what was measured before an interruption
        if arguments.out:
            save_results(arguments.out, found, rows)
        if arguments.summary:
            save_results(arguments.summary, found, rows, samples=False)
    if arguments.json:
        print(json.dumps({"schema": SCHEMA, "environment": found, "rows": rows}))
    else:
        print(row_table(rows))
    return int(any("failed" in row for row in rows))


def settings_of(arguments: Any) -> Settings:
    """The settings on the command line; `InputError` for one that cannot be."""
    if arguments.rounds < 1 or not arguments.seconds >= 0:
        raise InputError(
            f"expected 1 or more rounds of 0 or more seconds, found {arguments.rounds}, {arguments.seconds}"
        )
    for name, values in (("--runs", [arguments.runs]), ("--lanes", arguments.lanes or [1])):
        if min(values) < 1:
            raise InputError(f"{name}: expected 1 or more, found {min(values)}")
    for name, values in (("--rate", arguments.rate or [1]), ("--bound-ms", [arguments.bound_ms])):
        if not all(0 < value < float("inf") for value in values):
            raise InputError(f"{name}: expected a number above 0, found {min(values)}")
    return Settings(
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        most_rounds=max(arguments.rounds, arguments.most_rounds or 3 * arguments.rounds),
        runs=arguments.runs,
        rates=arguments.rate,
        bound_s=arguments.bound_ms * 1e-3,
        lanes=arguments.lanes or Settings().lanes,
    )


def _parser() -> Any:
    result = parser(
        "runtimes.bench",
        __doc__.partition(":")[0] + ".",
        "--model policy_mamba",
        "--model policy_gru --scenario all --triton --out results.json",
    )
    result.add_argument("--model", action="append", default=[], help="one model (default: all that are published)")
    result.add_argument("--target", action="append", default=[], help="one target beside torch (default: all)")
    result.add_argument("--scenario", action="append", default=[], choices=(*SCENARIOS, "all"),
                        help="what load (default: single-stream)")  # fmt: skip
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--device", choices=DEVICES, default="cpu",
                        help="where engines run that can run there (default: cpu)")  # fmt: skip
    result.add_argument("--threads", type=int, default=1, help="threads of each engine (default: 1)")
    result.add_argument("--seconds", type=float, default=0.2, help="length of a window (default: 0.2)")
    result.add_argument("--rounds", type=int, default=10, help="windows for each engine (default: 10)")
    result.add_argument("--most-rounds", type=int, help="windows until an engine is stable (default: 3 x rounds)")
    result.add_argument("--runs", type=int, default=1, help="repetitions in new processes (default: 1)")
    result.add_argument("--rate", type=float, action="append", default=[],
                        help="server: arrivals a second (default: 50 and 80 %% of an engine's own limit)")  # fmt: skip
    result.add_argument("--bound-ms", type=float, default=100.0, help="server: latency of a good answer (default: 100)")
    result.add_argument("--lanes", type=int, action="append", default=[],
                        help="concurrency: requests in flight (default: 1 2 4 8 16)")  # fmt: skip
    result.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which may start for minutes"
    )
    result.add_argument("--triton", action="store_true", help="also measure through a Triton started for each artifact")
    result.add_argument("--out", type=Path, help="write the results, with every sample, to this file")
    result.add_argument("--summary", type=Path, help="write the results without samples to this file")
    result.add_argument("--json", action="store_true", help="print JSON only")
    return result


if __name__ == "__main__":
    sys.exit(main())
