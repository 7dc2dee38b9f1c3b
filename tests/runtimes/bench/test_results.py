"""Rows: the windows and requests in their figures, and the notes about the others."""

from pathlib import Path
from typing import Any

import pytest

from runtimes import report
from runtimes.artifact import write_json
from runtimes.bench import suite
from runtimes.bench.interleave import Observation, Subject, joined
from runtimes.bench.load import Window
from runtimes.bench.measure import Measurement
from runtimes.bench.results import SCHEMA, counted_samples, row_table
from tests.runtimes.bench.measured import STEP, TOY, measurement
from tests.runtimes.result_rows import row as written


def row_of(*runs: Measurement, scenario: str = "single-stream", **more: Any) -> dict[str, Any]:
    subject = Subject(artifact=TOY, root=Path(), label="onnx")
    common: dict[str, Any] = {"subject": subject, "scenario": scenario, "sizes": STEP, "columns": more}
    return joined([Observation(**common, result=run) for run in runs])


def test_figures_are_of_the_steady_windows_and_the_others_are_kept() -> None:
    """50 samples before, 3 x 30 steady: enough for p95; and a second run whose first window is steady."""
    late = measurement([[2.0] * 50, [1.0] * 30, [1.02] * 30, [1.04] * 30], batch=4)
    row = row_of(late)
    assert (row["stable"], row["p50_s"], row["p90_s"]) == (True, 1.02, 1.04)
    assert row["p95_s"] == 1.04, "90 samples count"
    assert row_of(measurement([[2.0] * 50, [1.0] * 30, [1.02] * 30, [1.04] * 29]))["p95_s"] is None, "89 count"
    assert row["rows_per_s"] == pytest.approx(4 / 1.02)
    assert row["cpu_s_per_call"] == pytest.approx(2 * 1.02)
    assert row["run_medians_s"] == [1.02]
    assert (row["windows"], row["counted"]) == ([50, 30, 30, 30], [False, True, True, True])
    assert len(row["samples_s"]) == 140
    assert counted_samples(row) == row["samples_s"][50:]
    assert counted_samples({**row, "samples_s": []}) == [], "a file without samples"
    both = row_of(late, measurement([[1.0] * 9] * 3))
    assert both["counted"] == [False, True, True, True, True, True, True]
    assert both["run_medians_s"] == [1.02, 1.0]
    assert counted_samples(both) == both["samples_s"][50:]


def test_an_unstable_row_is_of_all_windows() -> None:
    row = row_of(measurement([[2.0] * 10, [1.0] * 10, [1.5] * 10]))
    assert (row["stable"], row["p50_s"], row["counted"]) == (False, 1.5, [True] * 3)


def test_the_knee_is_looked_for_in_the_steady_windows() -> None:
    """Without its slow start the second point has twice the throughput at nearly the same latency."""
    rows = [row_of(measurement([[1.0] * 9] * 3)), row_of(measurement([[9.0] * 99, *[[1.1] * 9] * 3], batch=2))]
    suite.mark_knee(rows)
    assert [row["knee"] for row in rows] == [False, True]


def test_refusals_have_a_share_and_are_no_good_answers() -> None:
    """30 answers within the bound and 10 refusals in each of three windows of ten seconds."""
    found = measurement([])
    for _ in range(3):
        found.windows.append(Window(samples_s=[0.1] * 30, wall_s=10.0, cpu_s=1.0, refused=10, service_s=[0.1] * 30,
                                    alone_s=[0.1] * 30, busy_s=3.0, rate_per_s=4.0, late=4))  # fmt: skip
    row = row_of(found, scenario="server", rate_per_s=4.0, bound_s=0.2)
    assert (row["stable"], row["refused"], row["refused_share"]) == (True, 30, 0.25)
    assert (row["goodput_per_s"], row["late_share"], row["rows_per_s"]) == (3.0, 0.1, 3.0)
    assert len(row["samples_s"]) == 90
    assert "25.0% refused, 3.0/s within 200 ms, 10.0% sent late" in row_table([row])
    assert "refused" not in row_table([row_of(measurement([[0.1] * 9] * 3))])


def test_a_row_that_was_refused_altogether_has_failed() -> None:
    found = measurement([])
    found.windows = [Window(samples_s=[], wall_s=1.0, cpu_s=0.1, refused=7)] * 3
    assert row_of(found)["failed"].startswith("expected answers, found 21 refusals; ")


@pytest.mark.parametrize(("schema", "status"), [("slipway.bench/1", 0), (SCHEMA, 0), ("slipway.bench/0", 2)])
def test_a_file_without_counted_windows_is_still_read(tmp_path: Path, schema: str, status: int) -> None:
    older = written("onnx", 1.0)
    assert not older.keys() & {"counted", "refused", "refused_share"}
    assert counted_samples(older) == older["samples_s"]
    path = tmp_path / "results.json"
    write_json(path, {"schema": schema, "environment": {}, "rows": [older]})
    assert report.main([str(path), "--html", str(tmp_path / "page.html")]) == status


def test_a_distribution_is_that_of_the_windows_that_count() -> None:
    """A sample of a second from before the steady stretch would stretch the axis."""
    before = written("onnx", 1.0, counted=[False, True], windows=[1, 100])
    before["samples_s"] = [1.0, *before["samples_s"]]
    drawn = [report.latency_strips([each]) for each in (before, written("onnx", 1.0))]
    assert drawn[0] == drawn[1]
    assert report.latency_strips([{**before, "counted": [True, True]}]) != drawn[1]
