"""Run the experiments of a model and compare them: python -m training.sweep MODEL"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtimes.artifact import sha256_json
from runtimes.errors import InputError, require
from runtimes.host.cli import command, flags, models_argument, parser, settings, table
from training.loop import train
from training.recipe import Sweep, data_arguments
from training.settings import configure
from training.spec import ModelSpec, all_specs, find_spec

ROWS, PLOT, TABLE = "sweep.json", "sweep.png", "sweep.txt"
FAR = 1.25  # a baseline above so many times the worst run is not plotted
Row = dict[str, Any]


@command
def main(argv: list[str] | None = None) -> int:
    """Train a model once for each of its experiments; write a table and a plot, the baselines in both."""
    result = parser(
        "training.sweep",
        __doc__.partition(":")[0] + ".",
        "hnet",
        "hnet --preset full --data telugu/ --out sweeps/hnet --model-dim '128 128' --epochs 4",
    )
    models_argument(result, "name of a model with experiments", least=1, most=1)
    data_arguments(result)
    result.add_argument("--out", type=Path, default=Path("sweeps"), help="folder of the results (default: %(default)s)")
    result.add_argument(
        "--no-plot",
        action="store_true",
        help="write no plot, which needs no matplotlib (default: a plot)",
    )
    arguments, more = result.parse_known_args(argv)
    spec = find_spec(arguments.model)
    sweep = spec.training.sweep
    if sweep is None:
        known = [other.name for other in all_specs().values() if other.trained and other.training.sweep]
        raise InputError(f"expected a model with experiments, found {spec.name}; known: {', '.join(known)}")
    if not arguments.no_plot:
        require("matplotlib", extra="plot")
    common = {**settings(arguments.set), **flags(more)}
    rows = run_all(spec, sweep, arguments.preset, common, arguments.data, arguments.out)
    shown = results_table(sweep, rows)
    (arguments.out / TABLE).write_text(shown + "\n")
    if not arguments.no_plot:
        plot(sweep, rows, arguments.out / PLOT)
    print(shown)
    return 0


def run_all(
    spec: ModelSpec, sweep: Sweep, preset: str, common: Mapping[str, str], data: Path | None, out: Path
) -> list[Row]:
    """The result of every experiment; one with a result for the same settings is not run again."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / ROWS
    rows: list[Row] = json.loads(path.read_text()) if path.is_file() else []
    experiments = sweep.runs(*configure(spec, preset, dict(common)))
    for name, changes in experiments.items():
        key = sha256_json([preset, {**common, **changes}, str(data)])
        if any(row["key"] == key for row in rows):
            continue
        print(f"{spec.name}: {name}", file=sys.stderr)
        row = {"name": name, "key": key, **run_one(spec, preset, {**common, **changes}, data, out / "runs" / key[:12])}
        rows = [*(other for other in rows if other["name"] != name), row]
        path.write_text(json.dumps(rows, indent=1) + "\n")
    return [next(row for row in rows if row["name"] == name) for name in experiments]


def run_one(spec: ModelSpec, preset: str, changes: dict[str, str], data: Path | None, folder: Path) -> Row:
    """Metrics, baselines, steps and seconds of one training run; its checkpoint lies in `folder`."""
    config, training = configure(spec, preset, changes)
    recipe = spec.training.recipe()(config, training, data)
    began, spent = time.monotonic(), time.process_time()
    done = train(spec, recipe, preset, folder)
    if done is None:
        raise InputError("expected one process, found a further one of torchrun; run a sweep without it")
    checkpoint, evaluation = done
    return {
        "settings": changes,
        "step": checkpoint.step,
        "seconds": time.monotonic() - began,
        "cpu_seconds": time.process_time() - spent,
        **asdict(evaluation),
    }


def results_table(sweep: Sweep, rows: list[Row]) -> str:
    """Experiments and then baselines in rows, the sweep's metrics in columns."""
    cells = [
        (
            row["name"],
            row["step"],
            *(_cell(row["metrics"].get(name)) for name in sweep.columns),
            f"{row['cpu_seconds']:.0f}",
        )
        for row in rows
    ]
    for name, metrics in _baselines(rows).items():
        cells.append((name, "-", *(_cell(metrics.get(column)) for column in sweep.columns), "-"))
    return table(["experiment", "step", *sweep.columns, "cpu_s"], cells)


def plot(sweep: Sweep, rows: list[Row], path: Path) -> None:
    """One point for each experiment; a line for a result without the metric of the first axis."""
    figures = require("matplotlib.figure", extra="plot")
    figure = figures.Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    across, up = sweep.plotted
    for i, row in enumerate(rows):
        metrics, color = row["metrics"], f"C{i % 10}"
        if across in metrics:
            axes.plot(metrics[across], metrics[up], "o", color=color, label=row["name"])
        else:
            axes.axhline(metrics[up], color=color, linestyle="--", label=row["name"])
    worst = max(row["metrics"][up] for row in rows)
    for name, metrics in _baselines(rows).items():
        if metrics[up] > FAR * worst:
            continue  # it is in the table; in the plot it would compress the range of all others
        axes.axhline(metrics[up], color="gray", linestyle=":")
        axes.annotate(name, (1, metrics[up]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color="gray")
    axes.set_xlabel(across.replace("_", " "))
    axes.set_ylabel(up.replace("_", " "))
    axes.legend()
    figure.savefig(path, dpi=120)


def _baselines(rows: list[Row]) -> dict[str, Any]:
    return rows[0]["baselines"] if rows else {}


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    sys.exit(main())
