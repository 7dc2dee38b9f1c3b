"""The matrix of models and targets: its lines, its text, the pages that it is written to."""

import re
from pathlib import Path

import pytest

from runtimes import matrix
from runtimes.artifact import write_json
from runtimes.bench.results import SCHEMA
from tests.runtimes.result_rows import ENVIRONMENT, ROWS, Row, cell, row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "matrix"

CELLS = [
    cell("torch"),
    cell("onnx", status="reused"),
    cell("onnx", "int8"),
    cell(
        "tensorrt", reason="no GPU here", facts={"built": True, "deserialized": False, "ran": False, "compared": False}
    ),
    cell("vllm", status="skipped", reason="not a decoder"),
    cell("openvino", status="failed", reason="it broke"),
    cell("vllm", status="skipped", reason="not a decoder", model="new"),
    cell("onnx", status="skipped", reason="no checkpoint of new", model="new"),
    cell("vllm", "awq", model="new"),
    cell("vllm", "int8", status="skipped", reason="target vllm has no int8, only awq", model="new"),
]


def made(rows: list[Row], cells: list[Row] | None = None) -> dict[str, dict[str, str]]:
    """The cells of every line of the matrix by the name of the line."""
    lines = matrix.lines_of(CELLS if cells is None else cells, rows)
    return {line.name: dict(zip(matrix.HEADER, line.cells(), strict=True)) for line in lines}


def test_a_line_has_one_number_in_each_column_and_its_status() -> None:
    lines = made(ROWS)
    assert list(lines["toy/onnx/int8"].values()) == [
        *("toy", "onnx", "int8", "1.30", "0.123", "0.970", lines["toy/onnx/int8"]["p50 ms"], "8.00", "-", "2000"),
        *("1", "25", "ok"),
    ]
    assert float(lines["toy/onnx/int8"]["p50 ms"]) == pytest.approx(0.5, rel=0.1)
    assert (lines["toy/onnx/fp32"]["rows/s"], lines["toy/onnx/fp32"]["batch"]) == ("1300", "4")
    assert lines["toy/torch/fp32"]["x eager"] == "1.00"
    for line in lines.values():
        for column in set(matrix.HEADER) - set(matrix.TEXTS):
            assert line[column] == "-" or float(line[column]) >= 0


def test_a_line_without_figures_has_the_reason() -> None:
    status = {name: line["status"] for name, line in made(ROWS).items()}
    assert status["toy/tensorrt/fp32"] == "no GPU here"
    assert status["toy/vllm/fp32"] == "skipped: not a decoder"
    assert status["toy/openvino/fp32"] == "failed: it broke"
    assert status["new/onnx/fp32"] == "skipped: no checkpoint of new"
    assert status["new/vllm/awq"] == "ok"
    assert "new/vllm/int8" not in status, "the target has no such precision"
    failed = [{**row("openvino", 1.0), "failed": "cannot | open it"}]
    assert made(failed, [cell("openvino")])["toy/openvino/fp32"]["status"] == "ok, not measured: cannot | open it"


def test_an_engine_that_is_no_target_is_a_comparison() -> None:
    line = made(ROWS)["toy/torch.compile/fp32"]
    assert (line["MB"], line["x eager"], line["status"]) == ("-", "2.00", "comparison, unstable")
    failed = [row("torch", 4.0), {**row("torch.compile", 2.0), "failed": "it cannot"}]
    assert made(failed)["toy/torch.compile/fp32"]["status"] == "comparison, not measured: it cannot"


def test_throughput_is_of_rows_of_the_same_sizes() -> None:
    """A row of 30 steps is no row of one step."""
    long = row("onnx", 1.0, sizes={"batch": 8, "tokens": 999}, rows_per_s=9e9)
    assert made([*ROWS, long])["toy/onnx/fp32"]["rows/s"] == "1300"


@pytest.mark.parametrize(
    ("eager", "other", "status"),
    [(True, True, "ok"), (True, False, "ok, unstable"), (False, True, "ok, unstable")],
)
def test_a_speed_that_was_not_stable_is_marked_and_so_is_a_multiple_of_one(
    eager: bool, other: bool, status: str
) -> None:
    lines = made([row("torch", 4, stable=eager), row("onnx", 1, stable=other)], [cell("torch"), cell("onnx")])
    assert lines["toy/onnx/fp32"]["status"] == status


def test_a_speed_has_its_interval_where_the_windows_are_paired() -> None:
    windows = {"counted": [True] * 6, "window_cpu_s_per_call": [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]}
    half = {**windows, "window_cpu_s_per_call": [0.5, 1.0, 1.5, 0.5, 1.0, 1.5]}
    line = made([row("torch", 4, **windows), row("onnx", 1, **half)])["toy/onnx/fp32"]
    assert (line["x eager"], line["95 % interval"]) == ("2.00", "2.00 to 2.00")


def test_the_table_is_markdown_with_a_legend_above() -> None:
    text = matrix.full(list(matrix.lines_of(CELLS, ROWS)), ENVIRONMENT)
    header = text.index("| target | precision | MB |")
    assert all(0 < text.index(f"**{column}**") < header for column in matrix.HEADER[3:])
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {len(matrix.HEADER)}
    assert text.index("## toy") < text.index("## new")


@pytest.fixture
def measured_folder(tmp_path: Path) -> Path:
    write_json(tmp_path / "results.json", {"schema": SCHEMA, "environment": ENVIRONMENT, "rows": ROWS})
    write_json(tmp_path / "export.json", {"cells": CELLS})
    return tmp_path


NAMES = "toy/onnx/fp32 toy/onnx/int8"
BEGIN_EXCERPT = matrix.EXCERPT.replace("MODEL/TARGET/PRECISION ...", NAMES)


@pytest.mark.parametrize("flag", ["--into", "--readme"])
@pytest.mark.parametrize(("begin", "lines"), [(matrix.FULL, 10), (BEGIN_EXCERPT, 2)], ids=["full", "excerpt"])
def test_the_matrix_is_written_between_its_markers_and_checked(
    measured_folder: Path, capsys: pytest.CaptureFixture[str], flag: str, begin: str, lines: int
) -> None:
    page = measured_folder / "page.md"
    page.write_text(f"before\n{begin}\nold\n{matrix.END}\nafter\n")
    arguments = [str(measured_folder), flag, str(page)]
    assert matrix.main([*arguments, "--check"]) == 2
    assert "found another" in capsys.readouterr().err
    assert matrix.main(arguments) == 0
    assert matrix.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"\n{matrix.END}\nafter\n")
    rows = [line for line in text.splitlines() if re.match(r"\| (toy|onnx|torch|tensorrt|vllm|openvino)\b", line)]
    assert len(rows) == lines


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no markers", "expected one pair of markers, found 0"),
        (f"{matrix.FULL}{matrix.END}" * 2, "expected one pair of markers, found 2"),
        (BEGIN_EXCERPT.replace("int8", "int7") + matrix.END, "did you mean 'toy/onnx/int8'"),
    ],
)
def test_a_file_with_other_markers_is_refused_and_not_changed(
    measured_folder: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    page = measured_folder / "page.md"
    page.write_text(text)
    assert matrix.main([str(measured_folder), "--into", str(page)]) == 2
    assert message in capsys.readouterr().err
    assert page.read_text() == text


def test_a_later_file_adds_its_models_and_replaces_cells(measured_folder: Path) -> None:
    write_json(
        measured_folder / "export_hnet.json", {"cells": [cell("onnx", model="hnet"), cell("onnx", bytes=9_000_000)]}
    )
    faster = [row("onnx", 0.25)]
    write_json(measured_folder / "results_hnet.json", {"schema": SCHEMA, "environment": {}, "rows": faster})
    lines = {line.name: line for line in matrix.read_matrix(measured_folder)[0]}
    assert lines["toy/onnx/fp32"].bytes == 9_000_000
    assert lines["toy/onnx/fp32"].speedup.times == pytest.approx(16)  # type: ignore[union-attr]
    assert "hnet/onnx/fp32" in lines


def test_a_folder_without_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert matrix.main([str(tmp_path)]) == 2
    assert "expected export*.json and results*.json" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/matrix.md"])
def test_the_published_matrix_is_that_of_the_results_kept_here(page: str) -> None:
    assert matrix.main([str(RESULTS), "--into", str(ROOT / page), "--check"]) == 0
