"""The matrix of a README, made from results: python -m runtimes.matrix benchmarks/matrix --readme README.md

The folder holds what `export.all --json` printed as export*.json, and what `runtimes.bench` wrote as results*.json. A
model or target that was not there before gets its row or column by being in one of them; of two files with the same
cell, the later by name counts.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.artifact import read_json
from runtimes.bench.results import Row, eager_row, load_results
from runtimes.errors import InputError
from runtimes.host.cli import command, existing_folder, parser

BEGIN, END = "<!-- matrix: made by runtimes.matrix, do not edit -->", "<!-- matrix: end -->"
BETWEEN = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
CELL_KEYS = {"model", "target", "precision", "status", "reason", "bytes", "parity", "facts"}
UNSTABLE = "~"
Cell = Mapping[str, Any]


@command
def main(argv: list[str] | None = None) -> int:
    """Print the matrix; with --readme put it between the marks there, or with --check say whether it is there."""
    arguments = _parser().parse_args(argv)
    made = matrix_of(existing_folder(arguments.folder, "results"))
    if not arguments.readme:
        print(made)
        return 0
    text = arguments.readme.read_text(encoding="utf-8")
    wanted = placed(text, made, arguments.readme)
    if arguments.check:
        if wanted != text:
            raise InputError(
                f"{arguments.readme}: expected the matrix of these results, found another; leave out --check"
            )
        return 0
    arguments.readme.write_text(wanted, encoding="utf-8")
    return 0


def matrix_of(folder: Path) -> str:
    """The matrix of the files in a folder; `InputError` unless there is one of each kind."""
    exported, measured = (sorted(folder.glob(f"{kind}*.json")) for kind in ("export", "results"))
    if not exported or not measured:
        raise InputError(
            f"expected export*.json and results*.json in {folder}, found {len(exported)} and {len(measured)}"
        )
    cells = {(cell["model"], cell["target"], cell["precision"]): cell for path in exported for cell in load_cells(path)}
    results = [load_results(path) for path in measured]
    rows = [row for each in reversed(results) for row in each["rows"]]  # whoever looks takes the first that fits
    return matrix(list(cells.values()), rows, results[0]["environment"])


def load_cells(path: Path) -> list[Cell]:
    """The cells that `export.all --json` printed; `InputError` for another file."""
    data = read_json(path)
    cells = data.get("cells") if isinstance(data, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and cell.keys() >= CELL_KEYS for cell in cells):
        raise InputError(f"{path}: expected what export.all --json prints, found another file")
    return cells


def matrix(cells: Sequence[Cell], rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """A row for each model, a column for each target, a line for each precision, and why places are empty."""
    models, targets = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("model", "target"))
    reasons: dict[str, int] = {}
    lines = [f"| model | {' | '.join(targets)} |", "|---" * (1 + len(targets)) + "|"]
    for model in models:
        places = ([cell for cell in cells if (cell["model"], cell["target"]) == (model, target)] for target in targets)
        lines.append(f"| {model} | {' | '.join(place_text(place, rows, reasons) for place in places)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    blocks = [lines, [legend(environment)], others(models, targets, rows), notes]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def place_text(cells: Sequence[Cell], rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """A line for each precision that the target has; one for all where all are empty for the same reason."""
    cells = [cell for cell in cells if not cell["reason"].startswith(f"target {cell['target']} has no ")]
    if not cells:
        return "–"
    if {cell["status"] for cell in cells} == {"skipped"} and len({cell["reason"] for cell in cells}) == 1:
        return cell_text(cells[0], rows, reasons)
    return "<br>".join(f"{cell['precision']} {cell_text(cell, rows, reasons)}" for cell in cells)


def cell_text(cell: Cell, rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """`0.12 · 1.3 MB · 3.1x`, or what else became of a cell; a reason is numbered and explained once."""
    note = _note(re.sub(rf"\b{cell['model']}\b", "the model", cell["reason"]), reasons) if cell["reason"] else ""
    if cell["status"] not in ("ok", "reused"):
        return f"{'–' if cell['status'] == 'skipped' else 'failed'}{note}"
    if not cell["facts"]["compared"]:
        return f"built, not run{note} · {_megabytes(cell['bytes'])}"
    row = row_of(cell, rows)
    parts = [_parity(cell["parity"], row), _megabytes(cell["bytes"]), speed_of(row, rows)]
    return " · ".join(filter(None, parts))


def row_of(cell: Cell, rows: Sequence[Row]) -> Row | None:
    """The first row of this cell's engine for one request, if it was measured."""
    return _first(rows, cell["model"], cell["target"], cell["precision"])


def others(models: Sequence[str], targets: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """A line for each engine that has no column: how fast it was for the models that were measured with it in fp32."""
    lines = []
    for engine in sorted({row["engine"] for row in rows} - {*targets}):
        speeds = ((model, speed_of(_first(rows, model, engine, "fp32"), rows)) for model in models)
        if measured := [f"{model} {speed}" for model, speed in speeds if speed]:
            lines.append(f"- For comparison, `{engine}` in fp32: {', '.join(measured)}")
    return lines


def speed_of(row: Row | None, rows: Sequence[Row]) -> str:
    """How many times as fast as torch eager for one request; of the baseline itself, its time.

    On a CPU by CPU time, which other work on the machine hardly disturbs; else by the median on the clock. UNSTABLE
    stands before what was not steady, or is a multiple of what was not.
    """
    if row is None:
        return ""
    eager = eager_row(rows, row)
    mark = UNSTABLE if any(each and each.get("stable") is False for each in (row, eager)) else ""
    on_cpu = row.get("device", "cpu") == "cpu" and row["cpu_s_per_call"] is not None
    clock = "cpu_s_per_call" if on_cpu else "p50_s"
    if eager is row:
        return f"{mark}{row[clock] * 1e3:.3g} ms"
    return f"{mark}{eager[clock] / row[clock]:.1f}x" if eager and eager.get(clock) else ""


def legend(environment: Mapping[str, Any]) -> str:
    where = environment.get("gpu") or f"{environment.get('cpus')} cores of {environment.get('cpu')}, no GPU"
    day = str(environment.get("time", "")).partition("T")[0]
    load = (environment.get("load") or ["unknown"])[0]
    return (
        "A cell: the largest difference from the original in units of the tolerance (1 is the limit), with the "
        "agreement of decisions where it is not 1; the size of the artifact; the speed of one request as a multiple of "
        "torch eager's, whose own time is given: on a CPU the CPU time, which other work on the machine hardly "
        f"disturbs. `{UNSTABLE}`: the engine, or torch eager beside it, was unstable while it was measured. "
        f"Measured {day} on {where}, {environment.get('threads')} thread an engine, load {load}."
    )


def placed(text: str, made: str, path: Path) -> str:
    """The text with the matrix between its marks; `InputError` unless there is exactly one such place."""
    if len(BETWEEN.findall(text)) != 1:
        raise InputError(
            f"{path}: expected one place between '{BEGIN}' and '{END}', found another number; write both lines"
        )
    return BETWEEN.sub(lambda _: f"{BEGIN}\n{made}\n{END}", text)


def _parity(parity: Mapping[str, float], row: Row | None) -> str:
    """The largest difference, and the agreement of decisions where it is known and below 1."""
    differences = [value for name, value in parity.items() if "difference" in name]
    text = f"{max(differences):.2g}" if differences else "ok"
    agreement = row["agreement"] if row else None
    return f"{text} ({agreement:.3f})" if agreement is not None and agreement < 0.9995 else text


def _first(rows: Sequence[Row], model: str, engine: str, precision: str) -> Row | None:
    """The first row of one request to this engine."""
    wanted = [model, engine, precision, "single-stream"]
    keys = ("model", "engine", "precision", "scenario")
    return next((row for row in rows if [row[key] for key in keys] == wanted and row.get("p50_s")), None)


def _note(reason: str, reasons: dict[str, int]) -> str:
    return f"<sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.0f} kB"


def _parser() -> Any:
    result = parser(
        "runtimes.matrix",
        "Makes the matrix of a README from results.",
        "benchmarks/matrix --readme README.md",
        "benchmarks/matrix --readme README.md --check",
    )
    result.add_argument("folder", type=Path, help="folder with export*.json and results*.json")
    result.add_argument("--readme", type=Path, help="put it between the marks in this file")
    result.add_argument(
        "--check", action="store_true", help="change nothing; status 2 if it is not there as it should be"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
