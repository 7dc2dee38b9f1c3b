"""Write the matrix of models and targets: python -m runtimes.matrix benchmarks/matrix --into docs/matrix.md

The folder holds the output of `export.all --json` as export*.json, and the files of `runtimes.bench` as results*.json.
A model or target in any of these files has its rows. Where two files hold the same cell, the last file by name counts.

A file of --into has one pair of lines, FULL or EXCERPT and END; the text between them is replaced.
"""

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.artifact import read_json
from runtimes.bench.results import (
    Row,
    Speedup,
    device_of,
    load_results,
    megabytes,
    name_of,
    number,
    speedup_of,
)
from runtimes.errors import InputError, one_line
from runtimes.host.cli import command, existing_folder, hidden_alias, parser, unknown_name
from runtimes.tensors import BATCH

FULL = "<!-- matrix: made by runtimes.matrix, do not edit -->"
EXCERPT = "<!-- matrix excerpt MODEL/TARGET/PRECISION ...: made by runtimes.matrix, do not edit -->"
END = "<!-- matrix: end -->"
BETWEEN = re.compile(
    r"(?P<begin><!-- matrix(?: excerpt (?P<names>[^:>]+))?: made by runtimes\.matrix, do not edit -->)"
    rf".*?{re.escape(END)}",
    re.DOTALL,
)
CELL_KEYS = {"model", "target", "precision", "status", "reason", "bytes", "parity", "facts"}
HEADER = ("model", "target", "precision", "MB", "difference", "agreement", "p50 ms", "x eager", "95 % interval",
          "rows/s", "batch", "memory MB", "status")  # fmt: skip
TEXTS = ("model", "target", "precision", "95 % interval", "status")
LEGEND = {
    "MB": "size of the artifact on disk.",
    "difference": "largest difference from the original model, in units of the tolerance; 1 is the limit.",
    "agreement": "lowest agreement of decisions with the original model; 1 means that all are equal.",
    "p50 ms": "median time of one request at batch 1.",
    "x eager": (
        "speed of one request as a multiple of torch eager in fp32, measured in runs interleaved with it; on a CPU by "
        "the CPU time of a call, which other processes disturb little, else by the median time."
    ),
    "95 % interval": "of x eager, from pairs of interleaved runs or windows; `-` where the file has no pairs.",
    "rows/s": "largest throughput of all measured batch sizes, in requests; **batch** is the batch size that has it.",
    "memory MB": "peak of memory of all processes of the engine.",
    "status": (
        "`ok`, `skipped` or `failed` with the reason; `comparison` is an engine beside the targets, such "
        "as torch.compile or a server; `unstable`: the last windows of the engine, or of torch eager, differed by "
        "more than 10 %."
    ),
}
REASON_LENGTH = 160  # characters of an engine's error
Cell = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One row of the matrix: a model, a target and a precision, with everything that the files hold about them.

    A figure is None where no file has it.

    difference     the largest difference from the original, in units of the tolerance
    agreement      the smallest value of the checks that have a lower limit
    p50_s          the median time of one request
    rows_per_s     throughput at `batch`, the batch size with the largest throughput
    memory_bytes   the peak of all processes of the engine; on a GPU the memory there
    """

    model: str
    target: str
    precision: str
    bytes: int | None = None
    difference: float | None = None
    agreement: float | None = None
    p50_s: float | None = None
    speedup: Speedup | None = None
    rows_per_s: float | None = None
    batch: int | None = None
    memory_bytes: int | None = None
    status: str

    @property
    def name(self) -> str:
        return f"{self.model}/{self.target}/{self.precision}"

    def cells(self) -> list[str]:
        speedup = self.speedup
        return [
            *(self.model, self.target, self.precision, _short(megabytes(self.bytes)), _short(self.difference)),
            *(number(self.agreement, 3), _short(None if self.p50_s is None else self.p50_s * 1e3)),
            *(number(speedup.times if speedup else None, 2), speedup.interval_text if speedup else "-"),
            *(number(self.rows_per_s, 0), "-" if self.batch is None else str(self.batch)),
            *(number(megabytes(self.memory_bytes), 0), self.status),
        ]


@command
def main(argv: list[str] | None = None) -> int:
    """Print the matrix; with --into write it into the files, or with --check compare it with their text."""
    arguments = _parser().parse_args(argv)
    lines, environment = read_matrix(existing_folder(arguments.folder, "results"))
    if not arguments.into:
        print(full(lines, environment))
        return 0
    texts = {path: path.read_text(encoding="utf-8") for path in arguments.into}
    replaced = {path: placed(text, lines, environment, path) for path, text in texts.items()}
    for path, text in replaced.items():
        if arguments.check and text != texts[path]:
            raise InputError(f"{path}: expected the matrix of these results, found another; run without --check")
        if not arguments.check:
            path.write_text(text, encoding="utf-8")
    return 0


def read_matrix(folder: Path) -> tuple[list[Line], Mapping[str, Any]]:
    """The lines and the environment of the files in a folder; `InputError` unless there is one file of each kind."""
    exported, measured = (sorted(folder.glob(f"{kind}*.json")) for kind in ("export", "results"))
    if not exported or not measured:
        raise InputError(
            f"expected export*.json and results*.json in {folder}, found {len(exported)} and {len(measured)}; "
            "run: make matrix"
        )
    cells = {(cell["model"], cell["target"], cell["precision"]): cell for path in exported for cell in load_cells(path)}
    results = [load_results(path) for path in measured]
    rows = [row for each in reversed(results) for row in each["rows"]]  # the first row that fits counts
    return list(lines_of(list(cells.values()), rows)), results[0]["environment"]


def load_cells(path: Path) -> list[Cell]:
    """The cells that `export.all --json` printed; `InputError` for another file."""
    data = read_json(path)
    cells = data.get("cells") if isinstance(data, dict) else None
    if not isinstance(cells, list) or not all(isinstance(cell, dict) and cell.keys() >= CELL_KEYS for cell in cells):
        raise InputError(f"{path}: expected the output of export.all --json, found another file; export again")
    return cells


def lines_of(cells: Sequence[Cell], rows: Sequence[Row]) -> Iterator[Line]:
    """The lines by model: a line for each cell, then one for each engine that was measured for comparison.

    A precision that a target does not have at all has no line.
    """
    targets = {cell["target"] for cell in cells}
    for model in dict.fromkeys(cell["model"] for cell in cells):
        for cell in cells:
            if cell["model"] == model and not cell["reason"].startswith(f"target {cell['target']} has no "):
                yield _exported_line(cell, rows)
        compared = [row for row in rows if row["model"] == model and row["engine"] not in targets]
        for engine, precision in dict.fromkeys((_engine_of(row), row["precision"]) for row in compared):
            if figures := _figures(model, engine, precision, rows):
                figures["status"] = figures["status"].replace("ok", "comparison", 1)
                yield Line(model=model, target=engine, precision=precision, **figures)


def full(lines: Sequence[Line], environment: Mapping[str, Any]) -> str:
    """The legend, then for each model a heading and a table with all its lines."""
    parts = [legend(environment)]
    for model in dict.fromkeys(line.model for line in lines):
        own = [line for line in lines if line.model == model]
        parts.append(f"## {model}\n\n{markdown_table(own, HEADER[1:])}")
    return "\n\n".join(parts)


def excerpt(lines: Sequence[Line], names: Sequence[str], environment: Mapping[str, Any]) -> str:
    """The legend and a table of the named lines; `InputError` for a name that no line has."""
    by_name = {line.name: line for line in lines}
    for name in names:
        if name not in by_name:
            raise unknown_name("row of the matrix", name, by_name, "write MODEL/TARGET/PRECISION in the first marker")
    return f"{legend(environment)}\n\n{markdown_table([by_name[name] for name in names], HEADER)}"


def markdown_table(lines: Sequence[Line], columns: Sequence[str]) -> str:
    """The lines as a Markdown table of these columns; numbers are aligned on the right."""
    shown = [f"| {' | '.join(columns)} |", "|" + "|".join("---" if c in TEXTS else "--:" for c in columns) + "|"]
    for line in lines:
        cells = dict(zip(HEADER, line.cells(), strict=True))
        shown.append("| " + " | ".join(cells[column].replace("|", "\\|") for column in columns) + " |")
    return "\n".join(shown)


def legend(environment: Mapping[str, Any]) -> str:
    """The meaning of every column, and where and when the figures were measured."""
    machine = environment.get("gpu") or f"{environment.get('cpus')} cores of {environment.get('cpu')}, no GPU"
    day = str(environment.get("time", "")).partition("T")[0]
    load = (environment.get("load") or ["unknown"])[0]
    lines = [f"- **{column}**: {meaning}" for column, meaning in LEGEND.items()]
    threads = f"{environment.get('threads')} thread per engine"
    return "\n".join([*lines, "", f"Measured {day} on {machine}, {threads}, load {load}. `-`: not measured."])


def placed(text: str, lines: Sequence[Line], environment: Mapping[str, Any], path: Path) -> str:
    """The text with the full matrix or the excerpt between its markers; `InputError` unless there is one pair."""
    found = list(BETWEEN.finditer(text))
    if len(found) != 1:
        raise InputError(
            f"{path}: expected one pair of markers, found {len(found)}; write '{FULL}' or '{EXCERPT}', then '{END}'"
        )
    (match,) = found
    names = (match["names"] or "").split()
    made = excerpt(lines, names, environment) if names else full(lines, environment)
    return f"{text[: match.start()]}{match['begin']}\n\n{made}\n\n{END}{text[match.end() :]}"


def _exported_line(cell: Cell, rows: Sequence[Row]) -> Line:
    name: dict[str, Any] = {key: cell[key] for key in ("model", "target", "precision")}
    if cell["status"] not in ("ok", "reused"):
        return Line(**name, status=f"{cell['status']}: {cell['reason']}")
    if not cell["facts"]["compared"]:
        return Line(**name, bytes=cell["bytes"], status=cell["reason"] or "built, not run")
    differences = [value for check, value in cell["parity"].items() if "difference" in check]
    figures = _figures(cell["model"], cell["target"], cell["precision"], rows)
    return Line(**name, bytes=cell["bytes"], difference=max(differences, default=None), **{"status": "ok"} | figures)


def _figures(model: str, engine: str, precision: str, rows: Sequence[Row]) -> dict[str, Any]:
    """The measured fields of a line, with its status; nothing where the engine was not measured."""
    own = [row for row in rows if (row["model"], _engine_of(row), row["precision"]) == (model, engine, precision)]
    measured = [row for row in own if "failed" not in row]
    single = [row for row in measured if row["scenario"] == "single-stream"]
    request = next((row for row in single if row.get("p50_s")), single[0] if single else None)
    if request is None:
        failed = next((row["failed"] for row in own if "failed" in row), None)
        return {"status": f"ok, not measured: {one_line(failed, REASON_LENGTH)}"} if failed else {}
    closed = [row for row in measured if row["scenario"] in ("single-stream", "offline")]
    best = max((row for row in closed if _row_sizes(row) == _row_sizes(request)), key=lambda row: row["rows_per_s"])
    speedup = speedup_of(rows, request)
    stable = request.get("stable", True) and (speedup is None or speedup.stable)
    return {
        "agreement": request["agreement"],
        "p50_s": request["p50_s"],
        "speedup": speedup,
        "rows_per_s": best["rows_per_s"],
        "batch": best["sizes"].get(BATCH),
        "memory_bytes": request["gpu_memory_bytes" if device_of(request) == "cuda" else "memory_bytes"],
        "status": "ok" if stable else "ok, unstable",
    }


def _engine_of(row: Row) -> str:
    """The engine, with the target that a server runs."""
    return name_of({**row, "precision": "fp32"})


def _row_sizes(row: Row) -> dict[str, int]:
    return {axis: size for axis, size in row["sizes"].items() if axis != BATCH}


def _short(value: float | None) -> str:
    """A number of 0 or more with about three digits, at most three of them decimals; a dash for None."""
    return number(value, 3 if value is None or value < 1 else max(0, 2 - int(math.log10(value))))


def _parser() -> Any:
    result = parser(
        "runtimes.matrix",
        "Writes the matrix of models and targets from results of export.all and runtimes.bench.",
        "benchmarks/matrix --into docs/matrix.md --into README.md",
        "benchmarks/matrix --into README.md --check",
    )
    result.add_argument("folder", type=Path, help="folder with export*.json and results*.json")
    result.add_argument("--into", type=Path, action="append", default=[], metavar="FILE",
                        help="write between the markers of this file; repeat for more (default: print)")  # fmt: skip
    hidden_alias(result, "--readme", "--into")
    result.add_argument(
        "--check", action="store_true", help="change nothing; status 2 if a file has another matrix (default: write)"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
