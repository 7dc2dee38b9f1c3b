"""Results files: rows with their raw samples, the same for every scenario, and the table of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, read_json, write_json
from runtimes.bench.load import goodput
from runtimes.bench.measure import Measurement
from runtimes.bench.statistics import SAMPLES_FOR, percentile
from runtimes.errors import InputError
from runtimes.host.cli import table

SCHEMA = "slipway.bench/2"
READABLE = ("slipway.bench/1", SCHEMA)  # figures of 1 are of all windows, and it counts no refusals
BASELINE = "torch"
KEYS = ("model", "target", "precision", "engine", "scenario", "sizes")
Row = dict[str, Any]


def save_results(path: Path, environment: Mapping[str, Any], rows: Sequence[Row], samples: bool = True) -> None:
    """Write a results file; without samples it is small enough to be kept under version control."""
    kept = rows if samples else [{**row, "samples_s": []} for row in rows]
    write_json(path, {"schema": SCHEMA, "environment": environment, "rows": kept})


def load_results(path: Path) -> dict[str, Any]:
    """The contents of a results file; `InputError` unless it is one."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("schema") not in READABLE:
        raise InputError(
            f"{path}: expected schema {SCHEMA}, found another file; make one: python -m runtimes.bench --out"
        )
    rows, environment = data.get("rows"), data.get("environment")
    whole = isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= set(KEYS) for row in rows)
    if not whole or not isinstance(environment, dict):
        raise InputError(f"{path}: expected an environment and rows with {', '.join(KEYS)}; measure again")
    return data


def head_of(artifact: Artifact, label: str, scenario: str, sizes: Mapping[str, int]) -> Row:
    """What every row begins with: who, where, and what it cost in accuracy and bytes."""
    worst = min(
        ((check.value, name) for name, check in artifact.parity.items() if check.at_least), default=(None, None)
    )
    differences = [check.value for name, check in artifact.parity.items() if "difference" in name]
    return {
        "model": artifact.model,
        "target": artifact.target,
        "precision": artifact.precision,
        "checkpoint": artifact.checkpoint,
        "engine": label,
        "scenario": scenario,
        "sizes": dict(sizes),
        "agreement": worst[0],
        "agreement_check": worst[1],
        "difference": max(differences, default=None),
    }


def measured(whole: Measurement, runs: Sequence[Measurement]) -> Row:
    """The figures of what counts in all runs, with the medians of each; every sample of every window of the runs.

    `windows` says how many samples each has, `counted` whether they are in the figures.
    """
    samples, parts = whole.samples_s, [run.counted for run in runs]
    device = [each for window in whole.windows for each in window.device_s]
    return {
        "provider": whole.provider,
        "stable": all(run.stable for run in runs),
        "load_s": whole.load_s,
        "first_call_s": whole.first_call_s,
        "warmup_s": whole.warmup_s,
        "warmup_calls": whole.warmup_calls,
        **{f"p{p}_s": percentile(samples, p) for p in SAMPLES_FOR},
        "rows_per_s": whole.rows_per_s,
        "cpu_s_per_call": whole.cpu_s_per_call,
        "device_p50_s": percentile(device, 50),
        "memory_bytes": whole.memory.memory_bytes,
        "gpu_memory_bytes": whole.memory.gpu_memory_bytes,
        "refused": whole.refused,
        "refused_share": whole.refused / (whole.refused + len(samples)),
        "run_medians_s": [part.run_median_s for part in parts],
        "run_cpu_s_per_call": [part.cpu_s_per_call for part in parts],
        "windows": [len(window.samples_s) for run in runs for window in run.windows],
        "counted": [i >= run.counted_from for run in runs for i in range(len(run.windows))],
        "samples_s": [round(sample, 9) for run in runs for sample in run.samples_s],
    }


def arrivals(whole: Measurement, bound_s: float) -> Row:
    """What the server scenario adds: answers within the bound, requests that were sent late, time from the sending."""
    sent = len(whole.samples_s) + whole.refused
    walls = [window.wall_s for window in whole.windows]
    good = sum(goodput(window, bound_s) * window.wall_s for window in whole.windows)
    return {
        "goodput_per_s": good / sum(walls),
        "late_share": sum(window.late for window in whole.windows) / sent,
        "service_p50_s": percentile([each for window in whole.windows for each in window.service_s], 50),
    }


def counted_samples(row: Row) -> list[float]:
    """The samples that a row's figures are of; all that it has, in a file that does not say which count."""
    if "counted" not in row:
        return list(row["samples_s"])
    counted = np.repeat(row["counted"], row["windows"])
    samples = np.asarray(row["samples_s"])
    return list(samples[counted[: len(samples)]])  # a file without samples has none


def name_of(row: Row) -> str:
    """How a reader knows an engine: `onnx int8`, `torch.compile`, `triton onnx`."""
    parts = [row["engine"]]
    if row["engine"] == "triton":
        parts.append(row["target"])
    if row["precision"] != "fp32":
        parts.append(row["precision"])
    return " ".join(parts)


def device_of(row: Row) -> str:
    """Where a row was measured; before rows told it, all were measured on a CPU."""
    return str(row.get("device", "cpu"))


def sizes_text(row: Row) -> str:
    """`batch=8 time=30`, and what else sets this row apart within its scenario."""
    parts = [f"{name}={size}" for name, size in row["sizes"].items()]
    if "lanes" in row:
        parts.append(f"lanes={row['lanes']}")
    if "rate_per_s" in row:
        parts.append(f"rate={row['rate_per_s']:.0f}/s")
    return " ".join(parts)


def eager_row(rows: Sequence[Row], row: Row) -> Row | None:
    """Torch eager in fp32 of the same checkpoint, at the same sizes under the same load, if it is in the file."""
    keys = ("model", "checkpoint", "scenario", "sizes", "lanes", "engine", "precision")
    wanted = [*(row.get(key) for key in keys[:-2]), BASELINE, "fp32"]
    same = (other for other in rows if [other.get(key) for key in keys] == wanted and "rate_per_s" not in other)
    return next((other for other in same if "failed" not in other), None)


def times_eager(rows: Sequence[Row], row: Row) -> float | None:
    """How many times as fast as torch eager this row is, or None."""
    eager = eager_row(rows, row)
    return eager["p50_s"] / row["p50_s"] if eager and eager["p50_s"] and row.get("p50_s") else None


def row_table(rows: Sequence[Row]) -> str:
    """The rows as text, each with its median as a multiple of torch eager's speed in the same run."""
    return table(*table_of(rows, COLUMNS))


def table_of(rows: Sequence[Row], columns: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each row. What no row has to tell, of a GPU above all, has no column."""
    lines = [{name: COLUMNS[name](rows, row) for name in HEAD} | _figures(rows, row) for row in rows]
    header = [name for name in columns if name not in SELDOM or any(line[name] != SELDOM[name] for line in lines)]
    return header, [[line[name] for name in header] for line in lines]


def _figures(rows: Sequence[Row], row: Row) -> dict[str, str]:
    rest = [name for name in COLUMNS if name not in HEAD]
    if "failed" in row:
        return {**dict.fromkeys(rest, "-"), "note": row["failed"]}
    return {name: COLUMNS[name](rows, row) for name in rest}


def note_of(row: Row) -> str:
    """What a reader must know beside the figures."""
    notes = [] if row["stable"] else ["unstable"]
    if row.get("knee"):
        notes.append("knee")
    if row.get("refused_share"):
        notes.append(f"{row['refused_share']:.1%} refused")
    if "goodput_per_s" in row:
        bound = f"{row['bound_s'] * 1e3:g} ms"
        notes.append(f"{row['goodput_per_s']:.1f}/s within {bound}, {row['late_share']:.1%} sent late")
    return ", ".join(notes)


def milliseconds(seconds: float | None) -> str:
    """Seconds as milliseconds with three digits; a dash where it is not known."""
    return number(None if seconds is None else seconds * 1e3, 3)


def megabytes(size: float | None) -> float | None:
    """Bytes in units of a million; None stays None."""
    return None if size is None else size / 1e6


def number(value: float | None, digits: int) -> str:
    """A number as text with so many digits; a dash where it is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def _percentile_ms(p: int) -> Callable[[Sequence[Row], Row], str]:
    return lambda rows, row: milliseconds(row[f"p{p}_s"])


# The columns of a table: what each says of a row among rows.
COLUMNS: Mapping[str, Callable[[Sequence[Row], Row], str]] = {
    "model": lambda rows, row: row["model"],
    "scenario": lambda rows, row: row["scenario"],
    "sizes": lambda rows, row: sizes_text(row),
    "engine": lambda rows, row: name_of(row),
    "device": lambda rows, row: device_of(row),
    "load s": lambda rows, row: number(row["load_s"], 2),
    "first ms": lambda rows, row: number(row["first_call_s"] * 1e3, 1),
    **{f"p{p} ms": _percentile_ms(p) for p in SAMPLES_FOR},
    "device ms": lambda rows, row: milliseconds(row["device_p50_s"]),
    "rows/s": lambda rows, row: number(row["rows_per_s"], 0),
    "MB": lambda rows, row: number(row["memory_bytes"] / 1e6, 0),
    "GPU MB": lambda rows, row: number(megabytes(row["gpu_memory_bytes"]), 0),
    "x eager": lambda rows, row: number(times_eager(rows, row), 2),
    "agreement": lambda rows, row: number(row["agreement"], 3),
    "note": lambda rows, row: note_of(row),
}
HEAD = ("model", "scenario", "sizes", "engine", "device")  # what is known of a row that failed as well
SELDOM = {"device": "cpu", "device ms": "-", "GPU MB": "-"}  # columns that are left out where every row says this


def run_medians(row: Row, clock: str) -> np.ndarray:
    """One figure a run, float64 [runs]: the median latency, or with clock `cpu` the CPU time of a call, in seconds."""
    return np.asarray(row["run_medians_s" if clock == "wall" else "run_cpu_s_per_call"], float)
