"""Out of memory, too slow, not accurate enough: what was measured about a model says what to do.

    python -m runtimes.advise policy_gru --results results.json --latency-ms 2

Nothing is advised that the results file does not show; what it does not show is named, with the command to measure it.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from runtimes.command import command, parser, table
from runtimes.errors import InputError
from runtimes.profiles import MACHINES
from runtimes.results import BASELINE, Row, load_results, milliseconds, name_of, number, sizes_text

PROBLEMS = ("out-of-memory", "too-slow", "low-accuracy")
DEVICES = ("cpu", "cuda", *MACHINES)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What is wanted; None is not limited."""

    latency_s: float | None = None
    memory_bytes: float | None = None
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """An engine as it was measured at the sizes of a request, and the limits that it misses."""

    name: str
    p50_s: float | None
    p90_s: float | None
    memory_bytes: int
    agreement: float | None
    rows_per_s: float
    misses: tuple[str, ...]


@dataclass(kw_only=True, slots=True)
class Advice:
    """What to choose, for which reason, and what each branch of the tree came to."""

    model: str
    measured_on: str
    choose: str | None
    warnings: list[str] = field(default_factory=list)
    options: list[Option] = field(default_factory=list)
    findings: dict[str, list[str]] = field(default_factory=dict)


@command
def main(argv: list[str] | None = None) -> int:
    """Print the advice; status 1 if nothing that was measured keeps all limits."""
    arguments = _parser().parse_args(argv)
    limits = limits_of(arguments)
    results = load_results(arguments.results)
    rows = [row for row in results["rows"] if row["model"] == arguments.model]
    if not any(row["scenario"] == "single-stream" and "failed" not in row for row in rows):
        models = ", ".join(sorted({row["model"] for row in results["rows"]})) or "none"
        raise InputError(
            f"expected single-stream rows of {arguments.model} in {arguments.results}, found models {models}; "
            f"measure it: python -m runtimes.bench --model {arguments.model} --out {arguments.results}"
        )
    advice = advise(arguments.model, rows, results["environment"], arguments.device, limits)
    if arguments.problem:
        advice.findings = {arguments.problem: advice.findings[arguments.problem]}
    print(json.dumps(asdict(advice)) if arguments.json else as_text(advice))
    return int(advice.choose is None)


def limits_of(arguments: Any) -> Limits:
    """The limits on the command line; a named machine limits the memory."""
    machine = MACHINES.get(arguments.device)
    memory: float | None = machine.memory_bytes if machine else None
    if arguments.memory_mb is not None:
        memory = arguments.memory_mb * 1e6
    for name in ("latency_ms", "memory_mb", "agreement"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value < float("inf"):
            raise InputError(f"--{name.replace('_', '-')}: expected a number of 0 or more, found {value}")
    latency = None if arguments.latency_ms is None else arguments.latency_ms * 1e-3
    return Limits(latency_s=latency, memory_bytes=memory, agreement=arguments.agreement)


def advise(model: str, rows: Sequence[Row], environment: Mapping[str, Any], device: str, limits: Limits) -> Advice:
    """The fastest option that keeps all limits, and the three branches."""
    measured = [row for row in rows if "failed" not in row]
    single = [row for row in measured if row["scenario"] == "single-stream"]
    request = [row for row in single if row["sizes"] == single[0]["sizes"]]
    options = sorted((option_of(row, limits) for row in request), key=lambda option: option.p50_s or float("inf"))
    good = [option for option in options if not option.misses]
    where = environment.get("gpu") or environment.get("cpu") or "an unknown machine"
    advice = Advice(model=model, measured_on=str(where), choose=good[0].name if good else None, options=options)
    advice.warnings += warnings(device, environment, rows)
    branches: tuple[Callable[..., Iterator[str]], ...] = (out_of_memory, too_slow, low_accuracy)
    for problem, branch in zip(PROBLEMS, branches, strict=True):
        advice.findings[problem] = list(branch(model, options, measured, limits))
    if device in MACHINES:
        held = ", ".join(f"{name} {value}" for name, value in MACHINES[device].holding.items() if value)
        advice.findings["out-of-memory"].append(f"a large frozen decoder is held there by --profile {device}: {held}")
    return advice


def option_of(row: Row, limits: Limits) -> Option:
    memory = row.get("gpu_memory_bytes") or row["memory_bytes"]
    slowest = row["p90_s"] or row["p50_s"]
    misses = []
    if limits.latency_s is not None and (slowest is None or slowest > limits.latency_s):
        misses.append("latency")
    if limits.memory_bytes is not None and memory > limits.memory_bytes:
        misses.append("memory")
    if limits.agreement is not None and (row["agreement"] is None or row["agreement"] < limits.agreement):
        misses.append("agreement")
    return Option(
        name=name_of(row),
        p50_s=row["p50_s"],
        p90_s=row["p90_s"],
        memory_bytes=memory,
        agreement=row["agreement"],
        rows_per_s=row["rows_per_s"],
        misses=tuple(misses),
    )


def warnings(device: str, environment: Mapping[str, Any], rows: Sequence[Row]) -> Iterator[str]:
    """Why the figures may not hold where the user wants to go."""
    gpu = environment.get("gpu")
    wanted = MACHINES[device].gpu if device in MACHINES else device
    if wanted == "cpu" and gpu:
        yield f"measured with {gpu} in the machine; rows of the CPU are those measured with --device cpu"
    elif wanted != "cpu" and (not gpu or (wanted != "cuda" and wanted not in gpu)):
        yield (
            f"measured on {gpu or environment.get('cpu')}, not on {wanted}: agreement carries over, times do not, "
            "memory only roughly; measure there: python -m runtimes.bench --device cuda --out results.json"
        )
    if unstable := sorted({name_of(row) for row in rows if row.get("stable") is False}):
        yield f"not stable while measured: {', '.join(unstable)}; measure again on an idle machine"
    for row in rows:
        if "failed" in row:
            yield f"{name_of(row)} could not be measured ({row['scenario']} {sizes_text(row)}): {row['failed']}"


def out_of_memory(model: str, options: Sequence[Option], rows: Sequence[Row], limits: Limits) -> Iterator[str]:
    """Another engine or precision, then smaller pieces, then other devices."""
    by_memory = sorted(options, key=lambda option: option.memory_bytes)
    least, base = by_memory[0], _named(options, BASELINE)
    yield f"the least is {least.name} with {_mb(least.memory_bytes)}{_beside(least.memory_bytes, base, 'memory_bytes')}"
    if limits.memory_bytes is not None:
        fitting = [option.name for option in by_memory if option.memory_bytes <= limits.memory_bytes]
        yield f"within {_mb(limits.memory_bytes)}: {', '.join(fitting) or 'nothing that was measured'}"
    yield from _smaller_precisions(options)
    batches = _sweep(rows, "offline", least.name)
    if len(batches) > 1:
        small, large = batches[0], batches[-1]
        grown = large["memory_bytes"] - small["memory_bytes"]
        yield (
            f"smaller pieces: {least.name} takes {_mb(grown)} more for {sizes_text(large)} than for {sizes_text(small)}"
        )
    else:
        yield f"smaller pieces: not measured; python -m runtimes.bench --model {model} --scenario offline"
    yield "recomputing activations saves memory in training alone: a served model keeps none"
    yield "layers on the CPU or the disk: not in this file; it is for decoders (--device_map, --profile) and costs time"


def too_slow(model: str, options: Sequence[Option], rows: Sequence[Row], limits: Limits) -> Iterator[str]:
    """Another engine or precision, then batches, then requests side by side."""
    fastest, base = options[0], _named(options, BASELINE)
    ratio = (
        f", {base.p50_s / fastest.p50_s:.1f} times as fast as torch eager"
        if base and base.p50_s and fastest.p50_s
        else ""
    )
    yield f"the fastest for one request is {fastest.name}: {milliseconds(fastest.p50_s)} ms{ratio}"
    if limits.latency_s is not None:
        kept = [option.name for option in options if "latency" not in option.misses]
        yield f"p90 within {milliseconds(limits.latency_s)} ms: {', '.join(kept) or 'nothing that was measured'}"
    batches = [row for row in rows if row["scenario"] == "offline"]
    if batches:
        best = max(batches, key=lambda row: row["rows_per_s"])
        single = next(row for row in batches if name_of(row) == name_of(best))
        yield (
            f"in batches: {name_of(best)} at {sizes_text(best)} does {best['rows_per_s']:.0f} rows/s, "
            f"{best['rows_per_s'] / single['rows_per_s']:.1f} times what it does at {sizes_text(single)}"
        )
    else:
        yield f"in batches: not measured; python -m runtimes.bench --model {model} --scenario offline"
    knees = [row for row in rows if row.get("knee")]
    for row in knees:
        yield f"side by side: {name_of(row)} has its knee at {row['lanes']} in flight, {row['rows_per_s']:.0f} rows/s"
    if not knees:
        yield f"side by side: not measured; python -m runtimes.bench --model {model} --scenario concurrency --triton"
    missing = sorted({"onnx", "openvino", "tensorrt", "vllm"} - {row["target"] for row in rows})
    if missing:
        yield f"not measured at all: {', '.join(missing)}; python -m export.all --model {model} --target NAME says why"


def low_accuracy(model: str, options: Sequence[Option], rows: Sequence[Row], limits: Limits) -> Iterator[str]:
    """What the conversion cost, and whether that is where accuracy is lost."""
    known = [option for option in options if option.agreement is not None]
    if not known:
        yield "no agreement is recorded: export the model again, its proof measures it"
        return
    for option in sorted(known, key=lambda option: -(option.agreement or 0)):
        if option.agreement is not None and option.agreement < 1:
            yield f"{option.name} keeps {option.agreement:.3f} of the original's decisions"
    exact = [option for option in known if option.agreement == 1]
    if exact:
        yield f"{exact[0].name} is the fastest that decides as the original does on all that it was proved on"
    if len(exact) == len(known):
        yield "no conversion changes a decision that was checked: what is missing, the checkpoint is missing too"
    yield (
        f"the model itself is judged by: python -m training.evaluate {model} --checkpoint DIR --json; better settings, "
        "parts and thresholds are found by training.run, and no benchmark shows them"
    )


def as_text(advice: Advice) -> str:
    """The advice as lines and one table."""
    lines = [f"{advice.model}, measured on {advice.measured_on}", ""]
    lines += [f"warning: {warning}" for warning in advice.warnings]
    cells = [
        [
            *(option.name, milliseconds(option.p50_s), milliseconds(option.p90_s), f"{option.rows_per_s:.0f}"),
            *(f"{option.memory_bytes / 1e6:.0f}", number(option.agreement, 3), ", ".join(option.misses)),
        ]
        for option in advice.options
    ]
    lines += [table(["engine", "p50 ms", "p90 ms", "rows/s", "MB", "agreement", "misses"], cells)]
    for problem, findings in advice.findings.items():
        lines += ["", problem.replace("-", " "), *(f"  {finding}" for finding in findings)]
    chosen = f"choose {advice.choose}" if advice.choose else "nothing that was measured keeps all limits"
    return "\n".join([*lines, "", chosen])


def _smaller_precisions(options: Sequence[Option]) -> Iterator[str]:
    """What each reduced precision saves against the same engine in fp32."""
    for option in options:
        engine, _, precision = option.name.rpartition(" ")
        full = _named(options, engine)
        if full and precision:
            yield (
                f"{option.name} takes {_mb(option.memory_bytes)} where {full.name} takes {_mb(full.memory_bytes)}, "
                f"at an agreement of {number(option.agreement, 3)}"
            )


def _sweep(rows: Sequence[Row], scenario: str, name: str) -> list[Row]:
    return [row for row in rows if row["scenario"] == scenario and name_of(row) == name]


def _named(options: Sequence[Option], name: str) -> Option | None:
    return next((option for option in options if option.name == name), None)


def _beside(value: float, base: Option | None, what: str) -> str:
    return f", {getattr(base, what) / value:.1f} times less than torch eager" if base and value else ""


def _mb(size: float) -> str:
    return f"{size / 1e6:.0f} MB"


def _parser() -> Any:
    result = parser(
        "runtimes.advise",
        "Out of memory, too slow, not accurate enough: what was measured about a model says what to do.",
        "policy_gru --results results.json --latency-ms 2",
        "strategy_encoder --results results.json --device colab-t4 --problem out-of-memory",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--results", type=Path, required=True, help="a file that runtimes.bench wrote")
    result.add_argument("--device", choices=DEVICES, default="cpu", help="where it is to run (default: cpu)")
    result.add_argument("--problem", choices=PROBLEMS, help="one branch alone (default: all three)")
    result.add_argument("--latency-ms", type=float, help="p90 of one request, at most")
    result.add_argument("--memory-mb", type=float, help="peak of memory, at most (default: what a named machine has)")
    result.add_argument("--agreement", type=float, help="agreement with the original's decisions, at least")
    result.add_argument("--json", action="store_true", help="print JSON only")
    return result


if __name__ == "__main__":
    sys.exit(main())
