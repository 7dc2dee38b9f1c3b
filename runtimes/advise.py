"""Choose an engine for a model from a results file: python -m runtimes.advise policy_gru --results results.json

Three branches: out of memory, too slow, not accurate enough. Advice uses the measured rows only; for a measurement that
is missing, it gives the command.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtimes.bench.results import (
    BASELINE,
    Row,
    device_of,
    load_results,
    megabytes,
    milliseconds,
    name_of,
    number,
    sizes_text,
)
from runtimes.errors import InputError
from runtimes.host.cli import command, json_argument, models_argument, parser, table, unknown_name
from runtimes.host.machines import MACHINES
from runtimes.runtime import DEVICES

PROBLEMS = ("out-of-memory", "too-slow", "low-accuracy")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits; None is no limit. Memory is that of the device; an engine that ran on it fits into its capacity."""

    latency_s: float | None = None
    memory_bytes: float | None = None
    capacity_bytes: float | None = None
    agreement: float | None = None

    @property
    def most_bytes(self) -> float | None:
        return self.capacity_bytes if self.memory_bytes is None else self.memory_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """An engine at the sizes of a request, and the limits that it misses.

    Of an engine that was measured on another machine only the agreement is known.
    """

    name: str
    p50_s: float | None = None
    p90_s: float | None = None
    memory_bytes: int | None = None
    agreement: float | None
    rows_per_s: float | None = None
    misses: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class Advice:
    """The chosen engine, and the findings of each branch.

    Where nothing was measured on the device, nothing is chosen, and `measure` is the command to run there.
    """

    model: str
    measured_on: str
    choose: str | None = None
    measure: str | None = None
    warnings: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    findings: dict[str, list[str]] = field(default_factory=dict)


@command
def main(argv: list[str] | None = None) -> int:
    """Print the advice; status 1 if no measured engine keeps all limits."""
    arguments = _parser().parse_args(argv)
    limits = limits_of(arguments)
    results = load_results(arguments.results)
    rows = [row for row in results["rows"] if row["model"] == arguments.model]
    if not requests(rows):
        measured = {row["model"] for row in requests(results["rows"], all_sizes=True)}
        remedy = f"measure it: python -m runtimes.bench {arguments.model} --out {arguments.results}"
        raise unknown_name(f"model with single-stream rows in {arguments.results}", arguments.model, measured, remedy)
    advice = advise(arguments.model, rows, results["environment"], arguments.device, limits)
    if arguments.problem:
        advice.findings = {arguments.problem: advice.findings[arguments.problem]}
    print(json.dumps(asdict(advice)) if arguments.json else as_text(advice))
    return int(advice.choose is None)


def limits_of(arguments: Any) -> Limits:
    """The limits on the command line, and the memory that a named machine has."""
    machine = MACHINES.get(arguments.device)
    for name in ("latency_ms", "memory_mb", "agreement"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')}: expected a number of 0 or more, found {value}")
    return Limits(
        latency_s=None if arguments.latency_ms is None else arguments.latency_ms * 1e-3,
        memory_bytes=None if arguments.memory_mb is None else arguments.memory_mb * 1e6,
        capacity_bytes=machine.memory_bytes if machine else None,
        agreement=arguments.agreement,
    )


def advise(model: str, rows: Sequence[Row], environment: Mapping[str, Any], device: str, limits: Limits) -> Advice:
    """The fastest option on the device that keeps all limits, and the findings of the three branches."""
    on_device = [row for row in rows if was_on(row, environment, device)]
    measured = [row for row in on_device if "failed" not in row]
    request = requests(measured)
    if request:
        machine = environment.get("cpu" if device == "cpu" else "gpu") or "an unknown machine"
        options = sorted((option_of(row, limits) for row in request), key=lambda option: option.p50_s or float("inf"))
        good = [option for option in options if not option.misses]
        advice = Advice(model=model, measured_on=str(machine), choose=good[0].name if good else None, options=options)
        for problem, branch in BRANCHES.items():
            advice.findings[problem] = list(branch(model, options, measured, limits))
    else:
        advice = unmeasured(model, rows, environment, device, limits)
    advice.warnings += warnings(on_device)
    if device in MACHINES:
        settings = ", ".join(f"{name} {value}" for name, value in MACHINES[device].holding.items() if value)
        advice.findings["out-of-memory"].append(f"a large frozen decoder fits with --profile {device}: {settings}")
    return advice


def was_on(row: Row, environment: Mapping[str, Any], device: str) -> bool:
    """Whether a row was measured on this device; a named machine is recognised by its GPU."""
    if device in MACHINES:
        return device_of(row) == "cuda" and MACHINES[device].gpu in (environment.get("gpu") or "")
    return device_of(row) == device


def requests(rows: Sequence[Row], *, all_sizes: bool = False) -> list[Row]:
    """The single-stream rows that did not fail, at the sizes of a request: those of the first row."""
    single = [row for row in rows if row["scenario"] == "single-stream" and "failed" not in row]
    return [row for row in single if all_sizes or row["sizes"] == single[0]["sizes"]]


def unmeasured(model: str, rows: Sequence[Row], environment: Mapping[str, Any], device: str, limits: Limits) -> Advice:
    """Advice from measurements on another machine: agreement carries over, times and memory do not."""
    expected = MACHINES[device].gpu if device in MACHINES else {"cpu": "a CPU", "cuda": "a GPU"}[device]
    target = "cpu" if device == "cpu" else "cuda"
    found = requests(rows)
    other = environment.get("gpu" if device_of(found[0]) == "cuda" else "cpu") or "an unknown machine"
    by_name = {name_of(row): row for row in found}  # an engine may have rows of both devices
    options = [
        Option(name=name, agreement=row["agreement"], misses=tuple(missed_agreement(row, limits)))
        for name, row in by_name.items()
    ]
    command = f"python -m runtimes.bench {model} --device {target} --scenario all --out results.json"
    advice = Advice(model=model, measured_on=str(other), measure=command, options=options)
    advice.warnings.append(f"measured on {other}, not on {expected}: agreement carries over, times and memory do not")
    for problem in ("out-of-memory", "too-slow"):
        advice.findings[problem] = [f"not measured on {expected}; {command}"]
    advice.findings["low-accuracy"] = list(low_accuracy(model, options, rows, limits))
    return advice


def option_of(row: Row, limits: Limits) -> Option:
    """The figures of a row, and the limits that it misses."""
    memory, slowest = memory_of(row), row["p90_s"] or row["p50_s"]
    misses = []
    if limits.latency_s is not None and (slowest is None or slowest > limits.latency_s):
        misses.append("latency")
    if memory is None and limits.memory_bytes is not None:
        misses.append("memory, which is unknown")
    if memory is not None and limits.most_bytes is not None and memory > limits.most_bytes:
        misses.append("memory")
    return Option(
        name=name_of(row),
        p50_s=row["p50_s"],
        p90_s=row["p90_s"],
        memory_bytes=memory,
        agreement=row["agreement"],
        rows_per_s=row["rows_per_s"],
        misses=(*misses, *missed_agreement(row, limits)),
    )


def missed_agreement(row: Row, limits: Limits) -> Iterator[str]:
    """The limit on agreement, if the row misses it or has no agreement."""
    if limits.agreement is not None and (row["agreement"] is None or row["agreement"] < limits.agreement):
        yield "agreement"


def memory_of(row: Row) -> int | None:
    """Peak bytes on the device of the row, or None; the memory of the host does not stand for that of a GPU."""
    memory: int | None = row["gpu_memory_bytes" if device_of(row) == "cuda" else "memory_bytes"]
    return memory


def warnings(rows: Sequence[Row]) -> Iterator[str]:
    """Engines that were not stable, and engines that failed."""
    if unstable := sorted({name_of(row) for row in rows if row.get("stable") is False}):
        yield f"not stable while measured: {', '.join(unstable)}; measure again on an idle machine"
    for row in rows:
        if "failed" in row:
            yield f"{name_of(row)} failed ({row['scenario']} {sizes_text(row)}): {row['failed']}"


def out_of_memory(model: str, options: Sequence[Option], rows: Sequence[Row], limits: Limits) -> Iterator[str]:
    """Findings: another engine or precision, smaller batches, other devices."""
    known = [(option.memory_bytes, option) for option in options if option.memory_bytes is not None]
    if known:
        yield from _memory_known(model, sorted(known, key=lambda pair: pair[0]), rows, limits)
    else:
        yield "unknown: the driver reports no memory of these processes; in a container start it with --pid=host"
    yield "recomputing activations saves memory in training only: a served model keeps no activations"
    yield "layers on the CPU or the disk: for decoders only (--device_map, --profile), slower, and not in this file"


def _memory_known(
    model: str, by_memory: Sequence[tuple[int, Option]], rows: Sequence[Row], limits: Limits
) -> Iterator[str]:
    options = [option for _, option in by_memory]
    (bytes_, least), base = by_memory[0], _named(options, BASELINE)
    yield f"the least is {least.name} with {_mb(bytes_)}{_against(bytes_, base)}"
    if limits.most_bytes is not None:
        fitting = [option.name for memory, option in by_memory if memory <= limits.most_bytes]
        yield f"within {_mb(limits.most_bytes)}: {', '.join(fitting) or 'no measured engine'}"
    yield from _smaller_precisions(options)
    batches = [(row, memory) for row in _sweep(rows, "offline", least.name) if (memory := memory_of(row)) is not None]
    if len(batches) > 1:
        (small, before), (large, after) = batches[0], batches[-1]
        more = f"{_mb(after - before)} more for {sizes_text(large)} than for {sizes_text(small)}"
        yield f"smaller batches: {least.name} takes {more}"
    else:
        yield f"smaller batches: not measured; python -m runtimes.bench {model} --scenario offline"


def too_slow(model: str, options: Sequence[Option], rows: Sequence[Row], limits: Limits) -> Iterator[str]:
    """Findings: another engine or precision, batches, concurrent requests."""
    fastest, base = options[0], _named(options, BASELINE)
    ratio = (
        f", {base.p50_s / fastest.p50_s:.1f} times as fast as torch eager"
        if base and base.p50_s and fastest.p50_s
        else ""
    )
    yield f"the fastest for one request is {fastest.name}: {milliseconds(fastest.p50_s)} ms{ratio}"
    if limits.latency_s is not None:
        kept = [option.name for option in options if "latency" not in option.misses]
        yield f"p90 within {milliseconds(limits.latency_s)} ms: {', '.join(kept) or 'no measured engine'}"
    batches = [row for row in rows if row["scenario"] == "offline"]
    if batches:
        best = max(batches, key=lambda row: row["rows_per_s"])
        single = next(row for row in batches if name_of(row) == name_of(best))
        yield (
            f"in batches: {name_of(best)} at {sizes_text(best)} has {best['rows_per_s']:.0f} rows/s, "
            f"{best['rows_per_s'] / single['rows_per_s']:.1f} times its throughput at {sizes_text(single)}"
        )
    else:
        yield f"in batches: not measured; python -m runtimes.bench {model} --scenario offline"
    knees = [row for row in rows if row.get("knee")]
    for row in knees:
        yield f"concurrent: {name_of(row)} has its knee at {row['lanes']} in flight, {row['rows_per_s']:.0f} rows/s"
    if not knees:
        yield f"concurrent: not measured; python -m runtimes.bench {model} --scenario concurrency --triton"
    measured = ", ".join(sorted({row["target"] for row in rows}))
    yield f"measured targets: {measured}; python -m export.all {model} --target all prints why there are no others"


def low_accuracy(model: str, options: Sequence[Option], rows: Sequence[Row], limits: Limits) -> Iterator[str]:
    """Findings: the agreement of each conversion with the original."""
    known = [option for option in options if option.agreement is not None]
    if not known:
        yield "no agreement is recorded: export the model again, its parity checks measure it"
        return
    for option in sorted(known, key=lambda option: -(option.agreement or 0)):
        if option.agreement is not None and option.agreement < 1:
            yield f"{option.name} has {option.agreement:.3f} of the original's decisions"
    exact = [option for option in known if option.agreement == 1]
    if exact and exact[0].p50_s is not None:
        yield f"{exact[0].name} is the fastest with all decisions of the original, on all inputs of its parity checks"
    elif exact:
        names = ", ".join(option.name for option in exact)
        yield f"all decisions of the original, on all inputs of the parity checks: {names}"
    if len(exact) == len(known):
        yield "no conversion changes a checked decision: the errors that remain are those of the checkpoint"
    yield (
        f"evaluate the model itself: python -m training.evaluate {model} --checkpoint DIR --json; training.run finds "
        "better settings and thresholds, a benchmark does not"
    )


def as_text(advice: Advice) -> str:
    """The advice as lines and one table."""
    lines = [f"{advice.model}, measured on {advice.measured_on}", ""]
    lines += [f"warning: {warning}" for warning in advice.warnings]
    cells = [
        [
            *(option.name, milliseconds(option.p50_s), milliseconds(option.p90_s), number(option.rows_per_s, 0)),
            *(number(megabytes(option.memory_bytes), 0), number(option.agreement, 3), ", ".join(option.misses)),
        ]
        for option in advice.options
    ]
    lines += [table(["engine", "p50 ms", "p90 ms", "rows/s", "MB", "agreement", "misses"], cells)]
    for problem, findings in advice.findings.items():
        lines += ["", problem.replace("-", " "), *(f"  {finding}" for finding in findings)]
    if advice.measure:
        chosen = f"no engine was measured on the device; measure there: {advice.measure}"
    else:
        chosen = f"choose {advice.choose}" if advice.choose else "no measured engine keeps all limits"
    return "\n".join([*lines, "", chosen])


def _smaller_precisions(options: Sequence[Option]) -> Iterator[str]:
    """The memory of each reduced precision beside the same engine in fp32."""
    for option in options:
        engine, _, precision = option.name.rpartition(" ")
        full = _named(options, engine)
        if full and precision and full.memory_bytes is not None and option.memory_bytes is not None:
            yield (
                f"{option.name} takes {_mb(option.memory_bytes)} where {full.name} takes {_mb(full.memory_bytes)}, "
                f"at an agreement of {number(option.agreement, 3)}"
            )


def _sweep(rows: Sequence[Row], scenario: str, name: str) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario and name_of(row) == name]


def _named(options: Sequence[Option], name: str) -> Option | None:
    return next((option for option in options if option.name == name), None)


def _against(memory_bytes: int, base: Option | None) -> str:
    if base is None or not base.memory_bytes or not memory_bytes:
        return ""
    return f", {base.memory_bytes / memory_bytes:.1f} times less than torch eager"


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


BRANCHES: Mapping[str, Callable[..., Iterator[str]]] = dict(
    zip(PROBLEMS, (out_of_memory, too_slow, low_accuracy), strict=True)
)


def _parser() -> Any:
    result = parser(
        "runtimes.advise",
        "Chooses an engine for a model from a results file: out of memory, too slow, not accurate enough.",
        "policy_gru --results results.json --latency-ms 2",
        "strategy_encoder --results results.json --device colab-t4 --problem out-of-memory",
    )
    models_argument(result, "the model", least=1, most=1)
    result.add_argument("--results", type=Path, required=True, help="a file of runtimes.bench")
    result.add_argument(
        "--device", choices=(*DEVICES, *MACHINES), default="cpu", help="device or machine to run on (default: cpu)"
    )
    result.add_argument("--problem", choices=PROBLEMS, help="print one branch only (default: all three)")
    result.add_argument("--latency-ms", type=float, help="limit on p90 of one request (default: none)")
    result.add_argument("--memory-mb", type=float, help="limit on the peak of memory on the device (default: none)")
    result.add_argument("--agreement", type=float, help="least agreement with the original's decisions (default: none)")
    json_argument(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
