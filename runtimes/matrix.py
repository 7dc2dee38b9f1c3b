"""The matrix of a README, made from results: python -m runtimes.matrix export.json results.json --readme README.md

The first file is what `export.all --json` printed, the second what `runtimes.bench` wrote. A model or target that was
not there before gets its row or column by being in them.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtimes.artifact import read_json
from runtimes.command import command, parser
from runtimes.errors import InputError
from runtimes.results import BASELINE, Row, load_results, times_eager

BEGIN, END = "<!-- matrix: made by runtimes.matrix, do not edit -->", "<!-- matrix: end -->"
BETWEEN = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
CELL_KEYS = {"model", "target", "precision", "status", "reason", "bytes", "parity", "facts"}
Cell = Mapping[str, Any]


@command
def main(argv: list[str] | None = None) -> int:
    """Print the matrix; with --readme put it between the marks there, or with --check say whether it is there."""
    arguments = _parser().parse_args(argv)
    results = load_results(arguments.results)
    made = matrix(load_cells(arguments.exported), results["rows"], results["environment"])
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


def load_cells(path: Path) -> list[Cell]:
    """The cells that `export.all --json` printed; `InputError` for another file."""
    data = read_json(path)
    cells = data.get("cells") if isinstance(data, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and cell.keys() >= CELL_KEYS for cell in cells):
        raise InputError(f"{path}: expected what export.all --json prints, found another file")
    return cells


def matrix(cells: Sequence[Cell], rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """A row for each model, a column for each target and precision that some model has, and why cells are empty."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    columns = list(dict.fromkeys(_column(cell) for cell in cells if cell["status"] != "skipped"))
    at = {(cell["model"], _column(cell)): cell for cell in cells}
    reasons: dict[str, int] = {}
    lines = [f"| model | {' | '.join(' '.join(column) for column in columns)} |", "|---" + "|---" * len(columns) + "|"]
    for model in models:
        texts = [cell_text(at.get((model, column)), rows, reasons) for column in columns]
        lines.append(f"| {model} | {' | '.join(texts)} |")
    if not columns:
        raise InputError("expected cells that were exported, found none; run export.all without --dry-run")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([*lines, "", legend(environment), *([""] if notes else []), *notes])


def cell_text(cell: Cell | None, rows: Sequence[Row], reasons: dict[str, int]) -> str:
    """`0.12 · 1.3 MB · 3.1x`, or what else became of a cell; a reason is numbered and explained once."""
    if cell is None:
        return "–"
    if cell["status"] not in ("ok", "reused"):
        return f"{'–' if cell['status'] == 'skipped' else 'failed'} {_note(cell['reason'], reasons)}"
    facts = cell["facts"]
    size = _megabytes(cell["bytes"])
    if not facts["compared"]:
        return f"built, not run {_note(cell['reason'], reasons)} · {size}"
    row = row_of(cell, rows)
    parts = [_parity(cell["parity"], row), size, speed_of(row, rows)]
    return " · ".join(filter(None, parts))


def row_of(cell: Cell, rows: Sequence[Row]) -> Row | None:
    """The first row of this cell's engine for one request, if it was measured."""
    wanted = [cell["model"], cell["target"], cell["precision"], cell["target"], "single-stream"]
    keys = ("model", "target", "precision", "engine", "scenario")
    return next((row for row in rows if [row[key] for key in keys] == wanted and row.get("p50_s")), None)


def speed_of(row: Row | None, rows: Sequence[Row]) -> str:
    """How many times as fast as torch eager for one request; of the baseline itself, its median."""
    if row is None:
        return ""
    if (row["engine"], row["precision"]) == (BASELINE, "fp32"):
        return f"{row['p50_s'] * 1e3:.3g} ms"
    times = times_eager(rows, row)
    return f"{times:.1f}x" if times else ""


def legend(environment: Mapping[str, Any]) -> str:
    where = environment.get("gpu") or f"{environment.get('cpus')} cores of {environment.get('cpu')}, no GPU"
    day = str(environment.get("time", "")).partition("T")[0]
    load = (environment.get("load") or ["unknown"])[0]
    return (
        "A cell: the largest difference from the original in units of the tolerance (1 is the limit), with the "
        "agreement of decisions where it is not 1; the size of the artifact; the speed of one request as a multiple of "
        f"torch eager's, whose own median is given. Measured {day} on {where}, {environment.get('threads')} thread an "
        f"engine, load {load}."
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


def _note(reason: str, reasons: dict[str, int]) -> str:
    return f"<sup>{reasons.setdefault(reason, len(reasons) + 1)}</sup>"


def _column(cell: Cell) -> tuple[str, str]:
    return cell["target"], cell["precision"]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB"


def _parser() -> Any:
    result = parser(
        "runtimes.matrix",
        "Makes the matrix of a README from results.",
        "export.json results.json --readme README.md",
        "export.json results.json --readme README.md --check",
    )
    result.add_argument("exported", type=Path, help="what export.all --json printed")
    result.add_argument("results", type=Path, help="what runtimes.bench wrote, with --out or --summary")
    result.add_argument("--readme", type=Path, help="put it between the marks in this file")
    result.add_argument(
        "--check", action="store_true", help="change nothing; status 2 if it is not there as it should be"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
