"""Results files: rows with their raw samples, the same for every scenario, and the table of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact, read_json, write_json
from runtimes.bench.load import Window, goodput
from runtimes.bench.measure import Measurement
from runtimes.bench.statistics import FEWEST_RUNS, SAMPLES_FOR, paired_ratio, percentile
from runtimes.errors import InputError
from runtimes.host.cli import table

SCHEMA = "slipway.bench/2"
READABLE = ("slipway.bench/1", SCHEMA)  # figures of 1 are of all windows; it has no refusals
BASELINE = "torch"
COMPILED = "torch.compile"
COMPARISONS = (COMPILED,)  # engines measured beside the artifacts of this repository
KEYS = ("model", "target", "precision", "engine", "scenario", "sizes")
Row = dict[str, Any]
_CLOCKS = {  # keys of the figures of each run and of each window
    "wall": ("run_medians_s", "window_medians_s"),
    "cpu": ("run_cpu_s_per_call", "window_cpu_s_per_call"),
}


def save_results(path: Path, environment: Mapping[str, Any], rows: Sequence[Row], samples: bool = True) -> None:
    """Write a results file; without samples it is small enough to be kept under version control."""
    kept = rows if samples else [{**row, "samples_s": []} for row in rows]
    write_json(path, {"schema": SCHEMA, "environment": environment, "rows": kept})


def load_results(path: Path) -> dict[str, Any]:
    """The contents of a results file; `InputError` for another file."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("schema") not in READABLE:
        raise InputError(
            f"{path}: expected schema {SCHEMA}, found another file; make one: python -m runtimes.bench --out"
        )
    rows, environment = data.get("rows"), data.get("environment")
    complete = isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= set(KEYS) for row in rows)
    if not complete or not isinstance(environment, dict):
        raise InputError(f"{path}: expected an environment and rows with {', '.join(KEYS)}; measure again")
    return data


def head_of(artifact: Artifact, label: str, scenario: str, sizes: Mapping[str, int]) -> Row:
    """The first fields of every row: the engine, the point, and the accuracy of the conversion."""
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


def measured(pooled: Measurement, runs: Sequence[Measurement]) -> Row:
    """The figures of a row: of `pooled`, the counted windows of all runs; and the samples of every window of the runs.

    `windows` has the number of samples of each window, `counted` whether the figures include them.
    """
    samples, parts = pooled.samples_s, [run.counted for run in runs]
    device = [each for window in pooled.windows for each in window.device_s]
    return {
        "provider": pooled.provider,
        "stable": all(run.stable for run in runs),
        "load_s": pooled.load_s,
        "first_call_s": pooled.first_call_s,
        "warmup_s": pooled.warmup_s,
        "warmup_calls": pooled.warmup_calls,
        **{f"p{p}_s": percentile(samples, p) for p in SAMPLES_FOR},
        "rows_per_s": pooled.rows_per_s,
        "cpu_s_per_call": pooled.cpu_s_per_call,
        "device_p50_s": percentile(device, 50),
        "memory_bytes": pooled.memory.memory_bytes,
        "gpu_memory_bytes": pooled.memory.gpu_memory_bytes,
        "refused": pooled.refused,
        "refused_share": pooled.refused / (pooled.refused + len(samples)),
        "run_medians_s": [part.run_median_s for part in parts],
        "run_cpu_s_per_call": [part.cpu_s_per_call for part in parts],
        **window_figures([window for run in runs for window in run.windows], runs[0].remote),
        "windows": [len(window.samples_s) for run in runs for window in run.windows],
        "counted": [i >= run.counted_from for run in runs for i in range(len(run.windows))],
        "samples_s": [round(sample, 9) for run in runs for sample in run.samples_s],
    }


def window_figures(windows: Sequence[Window], remote: bool) -> Row:
    """The median and the CPU time of a call of each window, None where there is none.

    Windows with the same index were measured next to each other, so they give paired ratios of two engines.
    """
    medians = [float(np.median(window.samples_s)) if window.samples_s else None for window in windows]
    cpu = [None if remote or not each.samples_s else each.cpu_s / len(each.samples_s) for each in windows]
    return {"window_medians_s": medians, "window_cpu_s_per_call": cpu}


def arrivals(pooled: Measurement, slo_s: float) -> Row:
    """The further fields of the server scenario: goodput, the share sent late, the median time from the sending."""
    sent = len(pooled.samples_s) + pooled.refused
    walls = [window.wall_s for window in pooled.windows]
    good = sum(goodput(window, slo_s) * window.wall_s for window in pooled.windows)
    return {
        "goodput_per_s": good / sum(walls),
        "late_share": sum(window.late for window in pooled.windows) / sent,
        "service_p50_s": percentile([each for window in pooled.windows for each in window.service_s], 50),
    }


def counted_samples(row: Row) -> list[float]:
    """The samples that the figures of a row include; all of them in a file without `counted`."""
    if "counted" not in row:
        return list(row["samples_s"])
    counted = np.repeat(row["counted"], row["windows"])
    samples = np.asarray(row["samples_s"])
    return list(samples[counted[: len(samples)]])  # a file without samples has none


def name_of(row: Row) -> str:
    """The displayed name of an engine: `onnx int8`, `torch.compile`, `triton onnx`."""
    parts = [row["engine"]]
    if row["engine"] == "triton":
        parts.append(row["target"])
    if row["precision"] != "fp32":
        parts.append(row["precision"])
    return " ".join(parts)


def device_of(row: Row) -> str:
    """The device of a row; rows of older files have none, and all were measured on a CPU."""
    return str(row.get("device", "cpu"))


def sizes_text(row: Row) -> str:
    """`batch=8 time=30`, then the load where the scenario has several."""
    parts = [f"{name}={size}" for name, size in row["sizes"].items()]
    if "lanes" in row:
        parts.append(f"concurrency={row['lanes']}")
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
    """The speed of this row as a multiple of torch eager's, by the medians; None where either is not known."""
    eager = eager_row(rows, row)
    return eager["p50_s"] / row["p50_s"] if eager and eager["p50_s"] and row.get("p50_s") else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Speedup:
    """The speed of one engine as a multiple of torch eager's, with the bounds of its interval where there are pairs."""

    times: float
    low: float | None = None
    high: float | None = None
    stable: bool

    @property
    def interval_text(self) -> str:
        return "-" if self.low is None or self.high is None else f"{self.low:.2f} to {self.high:.2f}"


def speedup_of(rows: Sequence[Row], row: Row) -> Speedup | None:
    """The speedup of a row over torch eager; on a CPU by CPU time, which other processes disturb little, else by p50.

    With FEWEST_RUNS runs or windows that were measured next to each other, it is the median of their ratios.
    """
    eager = eager_row(rows, row)
    on_cpu = device_of(row) == "cpu" and row["cpu_s_per_call"] is not None
    clock = "cpu_s_per_call" if on_cpu else "p50_s"
    if eager is None or not eager.get(clock) or not row.get(clock):
        return None
    stable = eager.get("stable", True) and row.get("stable", True)
    pairs = _pairs(eager, row, "cpu" if on_cpu else "wall")
    if len(pairs) < FEWEST_RUNS or eager is row:
        return Speedup(times=eager[clock] / row[clock], stable=stable)
    times, low, high = paired_ratio([a for a, _ in pairs], [b for _, b in pairs])
    return Speedup(times=times, low=low, high=high, stable=stable)


def _pairs(eager: Row, row: Row, clock: str) -> list[tuple[float, float]]:
    """(seconds of eager, seconds of the row) of each run, or of each counted window where there is one run."""
    of_run, of_window = _CLOCKS[clock]
    runs = [each.get(of_run, []) for each in (eager, row)]
    if max(map(len, runs)) > 1:
        return [(a, b) for a, b in zip(*runs, strict=False) if a and b]
    windows = [zip(each.get(of_window, []), each.get("counted", []), strict=False) for each in (eager, row)]
    return [(a, b) for (a, kept_a), (b, kept_b) in zip(*windows, strict=False) if kept_a and kept_b and a and b]


def failed_artifacts(rows: Sequence[Row]) -> list[Row]:
    """The failed rows of artifacts of ours; a failed comparison is none of them."""
    return [row for row in rows if "failed" in row and row["engine"] not in COMPARISONS]


def row_table(rows: Sequence[Row]) -> str:
    """The rows as text, each with its speed as a multiple of torch eager's in the same run."""
    return table(*table_of(rows, COLUMNS))


def table_of(rows: Sequence[Row], columns: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Header and a line for each row. A column of OPTIONAL in which every row has the default is left out."""
    lines = [{name: COLUMNS[name](rows, row) for name in HEAD} | _figures(rows, row) for row in rows]
    header = [name for name in columns if name not in OPTIONAL or any(line[name] != OPTIONAL[name] for line in lines)]
    return header, [[line[name] for name in header] for line in lines]


def _figures(rows: Sequence[Row], row: Row) -> dict[str, str]:
    rest = [name for name in COLUMNS if name not in HEAD]
    if "failed" in row:
        return {**dict.fromkeys(rest, "-"), "note": row["failed"]}
    return {name: COLUMNS[name](rows, row) for name in rest}


def note_of(row: Row) -> str:
    """Whether the row was stable, is a knee, or had refusals, and its goodput."""
    notes = [] if row["stable"] else ["unstable"]
    if row.get("knee"):
        notes.append("knee")
    if row.get("refused_share"):
        notes.append(f"{row['refused_share']:.1%} refused")
    if "goodput_per_s" in row:
        slo = f"{row['bound_s'] * 1e3:g} ms"
        notes.append(f"{row['goodput_per_s']:.1f}/s within {slo}, {row['late_share']:.1%} sent late")
    return ", ".join(notes)


def milliseconds(seconds: float | None, digits: int = 3) -> str:
    """Seconds as milliseconds with so many decimals; a dash for None."""
    return number(None if seconds is None else seconds * 1e3, digits)


def megabytes(size: float | None) -> float | None:
    """Bytes in units of a million; None stays None."""
    return None if size is None else size / 1e6


def number(value: float | None, digits: int) -> str:
    """A number as text with so many decimals; a dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _percentile_ms(p: int) -> Callable[[Sequence[Row], Row], str]:
    return lambda rows, row: milliseconds(row[f"p{p}_s"])


# The columns of a table: the text of each for a row among rows.
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
HEAD = ("model", "scenario", "sizes", "engine", "device")  # columns that a failed row has as well
OPTIONAL = {"device": "cpu", "device ms": "-", "GPU MB": "-"}  # columns with their default


def run_medians(row: Row, clock: str) -> np.ndarray:
    """One figure of each run, float64 [runs]: the median latency, or with clock `cpu` the CPU seconds of a call."""
    return np.asarray(row[_CLOCKS[clock][0]], float)
