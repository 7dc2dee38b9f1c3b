"""The uses of a results file: the page, Markdown, and advice."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from runtimes import advise, compare, matrix, report
from runtimes.artifact import write_json
from runtimes.bench.results import SCHEMA
from tests.runtimes.result_rows import ENVIRONMENT, ROWS, Row, cell, row

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "matrix"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "results.json"
    write_json(path, {"schema": SCHEMA, "environment": ENVIRONMENT, "rows": ROWS})
    return path


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_loads_nothing(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert report.main([str(results), "--html", str(page)]) == 0
    text = page.read_text()
    addresses = set(re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')>\s]+)""", text))
    assert addresses == {"#toy"}
    assert set(re.findall(r"https?://[^\"\s<]+", text)) == {"http://www.w3.org/2000/svg"}
    assert "<script" not in text


def test_the_page_has_every_plot_that_the_rows_have_data_for(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    report.main([str(results), "--html", str(page)])
    text = page.read_text()
    for title in ("Latency, one request at a time", "concurrent requests", "by batch", "under arrivals", "Memory",
                  "Speed against accuracy"):  # fmt: skip
        assert title in text
    assert "Memory on the GPU" not in text, "no row has any"
    assert "openvino cannot &lt;open&gt; it" in text
    assert text.count("<svg") == 6


def test_a_file_without_samples_still_makes_a_page(results: Path, tmp_path: Path) -> None:
    data = json.loads(results.read_text())
    for each in data["rows"]:
        each["samples_s"] = []
    write_json(results, data)
    assert report.main([str(results), "--html", str(tmp_path / "page.html")]) == 0


def test_markdown_has_every_row_with_as_many_cells_as_its_header(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(results)]) == 0
    printed = capsys.readouterr().out
    assert report.main([str(results), "--markdown", str(tmp_path / "summary.md")]) == 0
    assert (tmp_path / "summary.md").read_text() == printed
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(ROWS)
    assert len({line.count("|") for line in lines}) == 1
    (int8,) = (line for line in lines if "onnx int8" in line)
    assert "| 8.00 | 0.970 |" in int8


def test_gpu_figures_have_columns_where_a_row_has_any(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"device": "cuda", "device_p50_s": 0.00025, "gpu_memory_bytes": 70_000_000}
    on_gpu = row("torch", 4.0, **figures)
    assert report.main([str(results)]) == 0
    assert "device" not in capsys.readouterr().out.replace(report.READING, "")
    write_json(tmp_path / "gpu.json", {"schema": SCHEMA, "environment": ENVIRONMENT, "rows": [*ROWS, on_gpu]})
    assert report.main([str(tmp_path / "gpu.json")]) == 0
    header, _, first, *_, last = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    names, cpu, gpu = ([cell.strip() for cell in line.strip("|").split("|")] for line in (header, first, last))
    columns = [names.index(name) for name in ("device", "device ms", "GPU MB")]
    assert [cpu[i] for i in columns] == ["cpu", "-", "-"]
    assert [gpu[i] for i in columns] == ["cuda", "0.250", "70"]
    assert report.main([str(tmp_path / "gpu.json"), "--html", str(tmp_path / "gpu.html")]) == 0
    assert "<th>device ms</th>" in (tmp_path / "gpu.html").read_text()


def test_an_empty_or_strange_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "empty.json", {"schema": SCHEMA, "environment": {}, "rows": []})
    assert report.main([str(tmp_path / "empty.json")]) == 2
    assert "expected rows, found none" in capsys.readouterr().err


# Advice --------------------------------------------------------------------------------------------------------------


def advice(results: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    capsys.readouterr()
    status = advise.main(["toy", "--results", str(results), "--json", *arguments])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        ([], "onnx int8"),
        (["--agreement", "0.99"], "onnx"),
        (["--agreement", "0.99", "--latency-ms", "0.8"], None),
        (["--memory-mb", "30"], "onnx int8"),
        (["--memory-mb", "10"], None),
        (["--latency-ms", "0.1"], None),
    ],
)
def test_the_fastest_that_keeps_all_limits_is_chosen(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], chosen: str | None
) -> None:
    status, found = advice(results, capsys, *arguments)
    assert found["choose"] == chosen
    assert status == (chosen is None)


def test_every_branch_is_answered_from_the_rows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = advice(results, capsys)
    memory, slow, accuracy = ("\n".join(found["findings"][problem]) for problem in advise.PROBLEMS)
    assert "the least is onnx int8 with 25 MB, 8.0 times less than torch eager" in memory
    assert "onnx int8 takes 25 MB where onnx takes 50 MB, at an agreement of 0.970" in memory
    assert "the fastest for one request is onnx int8: 0.5" in slow
    assert "onnx at batch=4 tokens=16 has 1300 rows/s, 1.3 times its throughput at batch=1" in slow
    assert "triton onnx has its knee at 2 in flight" in slow
    assert "measured targets: onnx, torch; " in slow
    assert "onnx int8 has 0.970 of the original's decisions" in accuracy
    assert "onnx is the fastest with all decisions of the original" in accuracy


def test_a_missing_measurement_is_named_with_its_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "single.json"
    write_json(path, {"schema": SCHEMA, "environment": ENVIRONMENT, "rows": ROWS[:1]})
    _, found = advice(path, capsys)
    commands = [
        line for findings in found["findings"].values() for line in findings if "not measured; python -m" in line
    ]
    assert len(commands) == 3


def test_unstable_and_failed_engines_are_warnings(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warnings = advice(results, capsys)[1]["warnings"]
    assert not any("not on" in warning for warning in warnings)
    assert any("not stable while measured: torch.compile" in warning for warning in warnings)
    assert any("openvino cannot <open> it" in warning for warning in warnings)


def test_of_another_machine_only_agreement_carries_over_and_nothing_is_chosen(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of a CPU once ended in a choice for a T4."""
    status, found = advice(results, capsys, "--device", "colab-t4", "--agreement", "0.99")
    assert (status, found["choose"]) == (1, None)
    assert found["measure"].startswith("python -m runtimes.bench toy --device cuda --scenario all --out ")
    (warning,) = found["warnings"]
    assert warning == "measured on Toy CPU, not on Tesla T4: agreement carries over, times and memory do not"
    memory, slow, accuracy = (found["findings"][problem] for problem in advise.PROBLEMS)
    assert memory[0] == slow[0] == f"not measured on Tesla T4; {found['measure']}"
    assert "--profile colab-t4: loading nf4" in memory[1]
    assert "all decisions of the original, on all inputs of the parity checks: torch, torch.compile, onnx" in accuracy
    assert {option["name"]: option["misses"] for option in found["options"]}["onnx int8"] == ["agreement"]
    assert {option["p50_s"] for option in found["options"]} == {None}
    capsys.readouterr()
    assert advise.main(["toy", "--results", str(results), "--device", "colab-t4"]) == 1
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"no engine was measured on the device; measure there: {found['measure']}"
    assert not re.search("fastest|choose onnx", printed)


GPU_ROWS = [
    row("torch", 2.0, device="cuda", gpu_memory_bytes=900_000_000),
    row("torch", 1.0, device="cuda", precision="bf16", gpu_memory_bytes=450_000_000),
    row("openvino", 0.5, device="cpu"),
]


def of_a_gpu(path: Path, rows: list[Row], gpu: str = "Tesla T4 sm_75") -> Path:
    write_json(path, {"schema": SCHEMA, "environment": {**ENVIRONMENT, "gpu": gpu}, "rows": rows})
    return path


@pytest.mark.parametrize(
    ("arguments", "chosen"),
    [
        (["--device", "colab-t4"], "torch bf16"),
        (["--device", "cuda"], "torch bf16"),
        (["--device", "cpu"], "openvino"),
        (["--device", "cuda", "--memory-mb", "500"], "torch bf16"),
        (["--device", "cuda", "--memory-mb", "400"], None),
        (["--device", "colab-a100"], None),
    ],
)
def test_advice_is_from_the_rows_of_the_device_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], chosen: str | None
) -> None:
    _, found = advice(of_a_gpu(tmp_path / "gpu.json", GPU_ROWS), capsys, *arguments)
    assert found["choose"] == chosen
    assert bool(found["measure"]) == ("colab-a100" in arguments)


def test_the_memory_of_the_host_does_not_stand_for_that_of_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = of_a_gpu(tmp_path / "gpu.json", [{**each, "gpu_memory_bytes": None} for each in GPU_ROWS])
    status, found = advice(path, capsys, "--device", "cuda", "--memory-mb", "100000")
    assert (status, found["choose"]) == (1, None)
    assert {miss for option in found["options"] for miss in option["misses"]} == {"memory, which is unknown"}
    assert "unknown: the driver reports no memory of these processes" in found["findings"]["out-of-memory"][0]
    assert advice(path, capsys, "--device", "colab-t4")[1]["choose"] == "torch bf16", "it ran there, so it fits"


def test_a_failure_on_the_device_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failed = {**GPU_ROWS[0], "failed": "CUDA out of memory"}
    _, found = advice(of_a_gpu(tmp_path / "gpu.json", [failed, GPU_ROWS[2]]), capsys, "--device", "cuda")
    assert found["choose"] is None
    assert any("torch failed" in each and "CUDA out of memory" in each for each in found["warnings"])


def test_one_branch_can_be_requested_and_the_text_ends_with_the_choice(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert advise.main(["toy", "--results", str(results), "--problem", "too-slow"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "choose onnx int8"
    assert "too slow" in lines
    assert "low accuracy" not in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nobody"], "expected a known model with single-stream rows in"),
        (["tpy"], "found 'tpy'; did you mean 'toy'? measure it: python -m runtimes.bench tpy --out"),
        (["toy", "--latency-ms", "nan"], "--latency-ms: expected a number of 0 or more, found nan"),
        (["toy", "--agreement", "-1"], "--agreement: expected a number of 0 or more, found -1"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    results: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert advise.main([*arguments, "--results", str(results)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_of_version_0_1_still_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The stored file has rows of three scenarios with the keys of 0.1, and no figures of windows."""
    stored = Path(__file__).parent / "bench" / "results_of_0_1.json"
    assert '"window_medians_s"' not in stored.read_text()
    assert report.main([str(stored), "--html", str(tmp_path / "page.html")]) == 0
    assert report.main([str(stored)]) == 0
    assert "concurrency=2" in capsys.readouterr().out
    assert advise.main(["policy_gru", "--results", str(stored)]) == 0
    assert capsys.readouterr().out.endswith("choose onnx\n")
    assert compare.main([str(stored), str(stored), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["cells"]) == 6, "all but the row of arrivals"
    shutil.copy(stored, tmp_path / "results.json")
    write_json(tmp_path / "export.json", {"cells": [cell("onnx", model="policy_gru")]})
    (line, *_) = matrix.read_matrix(tmp_path)[0]
    assert (line.speedup.times > 1, line.batch, line.status) == (True, 1, "ok")  # type: ignore[union-attr]
