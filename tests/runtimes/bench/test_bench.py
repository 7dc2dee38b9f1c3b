"""The suite: results in the published schema, tables, the command line."""

import json
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtimes import plugins
from runtimes.artifact import Artifact, Check
from runtimes.bench import __main__ as bench
from runtimes.bench import suite
from runtimes.bench.interleave import Observation, Subject, joined
from runtimes.bench.load import Window
from runtimes.bench.measure import Worker
from runtimes.bench.plan import Settings
from runtimes.bench.results import (
    COMPILED,
    counted_samples,
    failed_artifacts,
    load_results,
    row_table,
    speedup_of,
    times_eager,
)
from runtimes.bench.statistics import SAMPLES_FOR
from runtimes.repository import find
from runtimes.runtime import DEVICES, device_for
from tests.runtimes.bench.measured import STEP, measurement
from tests.toys import DOUBLING, gone, make, needs_server

MODEL = "policy_gru"
WINDOW = {"batch": 8, "time": 30}
KEYS = {
    *(
        "model",
        "target",
        "precision",
        "checkpoint",
        "engine",
        "scenario",
        "sizes",
        "load_s",
        "first_call_s",
        "p50_s",
        "p90_s",
    ),
    *("p95_s", "p99_s", "rows_per_s", "memory_bytes", "agreement", "samples_s"),
}


def test_throughput_counts_the_rows_of_the_batch_over_the_time_that_passed() -> None:
    assert measurement([[0.1, 0.3], [0.1]], batch=8).rows_per_s == pytest.approx(8 * 3 / 0.5)
    assert measurement([[0.1, 0.3], [0.1]]).samples_s == [0.1, 0.3, 0.1]
    assert measurement([[0.1, 0.3], [0.1]]).cpu_s_per_call == pytest.approx(2 * 0.5 / 3)


def test_stable_is_about_latency_and_about_throughput() -> None:
    assert measurement([[1.0] * 5, [1.05] * 5, [1.09] * 5]).stable
    assert not measurement([[1.0] * 5, [1.05] * 5, [1.11] * 5]).stable
    half_idle = measurement([[1.0] * 5] * 3)
    half_idle.windows[1].wall_s *= 2
    assert not half_idle.stable


def test_bench_writes_the_documented_schema(
    gru_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], started_pids: list[int]
) -> None:
    out, summary = tmp_path / "rows.json", tmp_path / "summary.json"
    arguments = ["--repository", str(gru_repository), "--windows", "3", "--seconds", "0.03", "--runs", "2"]
    capsys.readouterr()
    assert bench.main([*arguments, "--out", str(out), "--summary", str(summary), "--json"]) == 0
    data = load_results(out)
    assert json.loads(capsys.readouterr().out)["rows"] == data["rows"]
    assert set(data) == {"schema", "environment", "rows"}
    assert data["schema"] == "slipway.bench/2"
    assert data["environment"]["threads"] == 1
    assert data["environment"].keys() >= {"cpu", "cpus", "cpu_mhz", "gpu", "gpu_state", "git", "load", "versions"}
    assert [row["sizes"] for row in data["rows"]] == [STEP, WINDOW]
    for row in data["rows"]:
        check_row(row)
    assert all(gone(pid) for pid in started_pids)
    for row, kept in zip(data["rows"], load_results(summary)["rows"], strict=True):
        assert kept == {**row, "samples_s": []}


def check_row(row: Mapping[str, Any]) -> None:
    """A row of the tiny GRU in ONNX Runtime, from two runs, whose figures follow from its samples."""
    assert row.keys() >= KEYS
    assert (row["model"], row["target"], row["precision"], row["engine"]) == (MODEL, "onnx", "fp32", "onnx")
    samples = row["samples_s"]
    assert sum(row["windows"]) == len(samples)
    assert len(row["run_medians_s"]) == len(row["run_cpu_s_per_call"]) == 2
    samples = counted_samples(row)
    for p, needed in SAMPLES_FOR.items():
        want = np.percentile(samples, p) if len(samples) >= needed else None
        assert row[f"p{p}_s"] == (want if want is None else pytest.approx(want, abs=1e-9))
    assert row["rows_per_s"] <= row["sizes"]["batch"] * len(samples) / sum(samples) * 1.001
    assert row["agreement"] == 1.0
    assert 0 <= row["difference"] <= 1
    assert row["memory_bytes"] > 10_000_000
    assert row["device_p50_s"] is None


def test_rows_measured_before_an_interruption_are_kept(
    gru_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[dict[str, Any]]:
        yield row("onnx", 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    assert bench.main(["--repository", str(gru_repository), "--out", str(tmp_path / "rows.json")]) == 130
    assert len(load_results(tmp_path / "rows.json")["rows"]) == 1


def test_a_failed_artifact_is_in_the_status_and_affects_no_other_row(
    gru_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**row("torch", 3), "failed": "the engine's process died with status -9"}, row("onnx", 3)]
    monkeypatch.setattr(bench, "measure", lambda *_: iter(rows))
    capsys.readouterr()
    assert bench.main(["--repository", str(gru_repository), "--out", str(tmp_path / "rows.json")]) == 1
    assert "died with status -9" in capsys.readouterr().out
    assert load_results(tmp_path / "rows.json")["rows"] == rows
    rows.pop(0)
    assert bench.main(["--repository", str(gru_repository)]) == 0


def test_a_failed_comparison_is_in_the_table_and_not_in_the_status(
    gru_repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile cannot compile every model at every size; no artifact of this repository is at fault."""
    comparison = {**row(COMPILED, 3), "failed": "InductorError: it cannot compile this"}
    artifact = {**row("onnx", 3), "failed": "it cannot open this"}
    assert failed_artifacts([comparison, artifact, row("onnx", 3)]) == [artifact]
    for rows, status in (([comparison, row("onnx", 3)], 0), ([comparison, artifact], 1)):
        monkeypatch.setattr(bench, "measure", lambda *_, rows=rows: iter(rows))
        capsys.readouterr()
        assert bench.main(["--repository", str(gru_repository)]) == status
        assert "InductorError: it cannot compile this" in capsys.readouterr().out


def test_flags_of_the_version_before_still_work(
    gru_repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Settings] = []
    monkeypatch.setattr(bench, "measure", lambda subjects, scenarios, settings: given.append(settings) or iter([]))
    old = ["--rounds", "3", "--most-rounds", "4", "--bound-ms", "50", "--lanes", "2", "--lanes", "3"]
    new = ["--windows", "3", "--max-windows", "4", "--slo-ms", "50", "--concurrency", "2", "--concurrency", "3"]
    for flags in (old, new):
        assert bench.main([MODEL, "--repository", str(gru_repository), *flags]) == 0
    assert given[0] == given[1] == Settings(windows=3, max_windows=4, slo_s=0.05, concurrency=(2, 3))
    assert bench.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert not any(flag in text for flag in ("--rounds", "--most-rounds", "--bound-ms", "--lanes", "--model"))


def test_every_scenario_has_its_rows(gru_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    more = [
        "--scenario",
        "offline",
        "--scenario",
        "server",
        "--scenario",
        "concurrency",
        "--concurrency",
        "1",
        "--concurrency",
        "2",
    ]
    rates = ["--rate", "100", "--slo-ms", "10000"]
    arguments = ["--repository", str(gru_repository), "--windows", "1", "--seconds", "0.01", "--json", *more, *rates]
    assert bench.main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = {name: [row for row in rows if row["scenario"] == name] for name in ("offline", "server", "concurrency")}
    assert sum(map(len, found.values())) == len(rows)
    assert [row["sizes"]["batch"] for row in found["offline"]] == [1, 2, 4, 8, 16, 32]
    (server,) = found["server"]
    assert (server["rate_per_s"], server["bound_s"]) == (100.0, 10.0)
    assert len(server["samples_s"]) / server["goodput_per_s"] == pytest.approx(3 * 0.3, rel=0.5), "all are good"
    assert 0 <= server["late_share"] <= 1
    assert [row["lanes"] for row in found["concurrency"]] == [1, 2]
    assert sorted(row["knee"] for row in found["concurrency"]) == [False, True]
    assert len(row_table(rows).splitlines()) == 2 + len(rows)


def test_an_engine_that_fails_or_dies_costs_its_own_row(gru_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = find(gru_repository, f"{MODEL}_onnx")
    artifact = Artifact.load(root)
    subjects = [
        Subject(artifact=artifact, root=root, label=label, options=options)
        for label, options in (("torch", {}), ("dies", {}), ("tpu", {"device": "tpu"}))
    ]
    made: list[Worker] = []
    window = Worker.window

    def die_once(self: Worker, load: Mapping[str, Any]) -> Window:
        if self not in made:
            made.append(self)
        if len(made) == 2 and self is made[1]:
            os.kill(self.pid, signal.SIGKILL)
            self._process.wait()
        return window(self, load)

    monkeypatch.setattr(Worker, "window", die_once)
    monkeypatch.setattr(artifact.signature.__class__, "sizes", lambda self, bound: dict(STEP))
    rows = list(suite.measure(subjects, ["single-stream"], Settings(seconds=0.01, windows=3, max_windows=3)))[:3]
    assert [row["engine"] for row in rows] == ["torch", "dies", "tpu"]
    assert rows[0]["rows_per_s"] > 0
    assert rows[1]["failed"] == "the engine's process died with status -9"
    assert "found 'tpu'" in rows[2]["failed"]
    table = row_table(rows).splitlines()
    assert len(table) == 5
    assert "1.00" in table[2].split()
    assert table[3].endswith("the engine's process died with status -9")


def row(engine: str, samples: int, seconds: float = 0.002, precision: str = "fp32") -> dict[str, Any]:
    parity = {"same": Check(value=0.5, limit=0.4, at_least=True), "difference_y": Check(value=0.1, limit=1.0)}
    artifact: Any = SimpleNamespace(model=MODEL, target="onnx", precision=precision, checkpoint="1", parity=parity)
    subject = Subject(artifact=artifact, root=Path(), label=engine)
    result = measurement([[seconds] * samples])
    return joined([Observation(subject=subject, scenario="single-stream", sizes=STEP, columns={}, result=result)])


def test_an_engine_without_a_gpu_is_measured_on_the_cpu_and_its_row_has_that_device(tmp_path: Path) -> None:
    """With one engine refusing the device, a benchmark on a GPU would always fail."""
    engines = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
    for target, engine in engines.items():
        make(tmp_path / f"doubling_{target}" / "1", DOUBLING, target=target, runtime=engine)
    for wanted, expected in (
        ("cuda", {"torch": "cuda", "torch.compile": "cuda", "onnx": "cuda", "openvino": "cpu", "tensorrt": "cuda"}),
        ("cpu", {"torch": "cpu", "torch.compile": "cpu", "onnx": "cpu", "openvino": "cpu", "tensorrt": "cuda"}),
    ):
        subjects = list(suite.choose(tmp_path, [], [], {"device": wanted, "threads": 1}))
        point = {"scenario": "offline", "sizes": {"batch": 1}, "columns": {}, "result": measurement([[0.1]])}
        rows = [joined([Observation(subject=each, **point)]) for each in subjects]
        assert {row["engine"]: row["device"] for row in rows} == expected
        assert {each.label: each.options["device"] for each in subjects} == expected
        assert all(each.options["threads"] == 1 for each in subjects)


def test_an_artifact_that_generates_is_left_out(tmp_path: Path) -> None:
    make(tmp_path / "doubling_torch" / "1", DOUBLING, target="torch", runtime="torch", pipeline="hallucination_aarf")
    make(tmp_path / "doubling_onnx" / "1", DOUBLING)
    found = suite.choose(tmp_path, [], [], {"device": "cpu"})
    assert [subject.artifact.target for subject in found] == ["onnx"]


@pytest.mark.parametrize("engine", plugins.names("runtimes.engines"))
def test_the_device_an_engine_is_measured_on_is_one_it_has(engine: str) -> None:
    has = plugins.load("runtimes.engines", engine, "RUNTIME").devices
    assert has
    assert all(device_for(engine, wanted) in has for wanted in DEVICES)


def test_a_row_has_the_accuracy_of_the_conversion() -> None:
    found = row("onnx", 10)
    assert (found["agreement"], found["agreement_check"], found["difference"]) == (0.5, "same", 0.1)


def test_a_table_has_the_speed_of_each_engine_as_a_multiple_of_eager() -> None:
    rows = [row("torch", 10, 0.004), row("torch", 10, 0.001, "bf16"), row("onnx", 10, 0.002)]
    header, _, *lines = row_table(rows).splitlines()
    end = header.index("x eager") + len("x eager")
    assert [line[:end].split()[-1] for line in lines] == ["1.00", "4.00", "2.00"]


def test_only_eager_of_the_same_checkpoint_is_a_baseline(
    gru_repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, other = row("torch", 10, 0.004), {**row("onnx", 10, 0.002), "checkpoint": "another"}
    assert times_eager([eager, other], other) is None
    assert times_eager([eager, other], {**other, "checkpoint": eager["checkpoint"]}) == pytest.approx(2)
    onnx = next(suite.choose(gru_repository, [], [], {"device": "cpu"}))
    torch = replace(onnx, label="torch")
    retrained = replace(torch, artifact=replace(torch.artifact, checkpoint="another"))
    monkeypatch.setattr(bench, "measure", lambda *_: iter([]))
    for workspace, found in ((torch, False), (retrained, True)):
        monkeypatch.setattr(bench, "choose", lambda *_, workspace=workspace: iter([onnx, workspace]))
        capsys.readouterr()
        assert bench.main(["--repository", str(gru_repository)]) == 0
        assert ("expected torch eager of the same checkpoint, found none" in capsys.readouterr().err) == found


def test_a_speedup_has_an_interval_where_windows_or_runs_are_paired() -> None:
    """Windows that drift together: the ratio of each pair is 2, so the interval is narrow although times vary by 3."""
    drift = np.linspace(1, 3, 8)
    eager, other = row("torch", 10), row("onnx", 10)
    assert speedup_of([eager, other], other).interval_text == "-", "one window is no pair of five"  # type: ignore[union-attr]
    for each, factor in ((eager, 2.0), (other, 1.0)):
        each |= {"window_cpu_s_per_call": (factor * drift).tolist(), "counted": [True] * 8}
    found = speedup_of([eager, other], other)
    assert found is not None
    assert (found.times, found.low, found.high) == (pytest.approx(2), pytest.approx(2), pytest.approx(2))
    assert found.interval_text == "2.00 to 2.00"
    other["counted"] = [False] * 4 + [True] * 4
    assert speedup_of([eager, other], other).low is None, "four counted pairs are too few"  # type: ignore[union-attr]
    for each, factor in ((eager, 3.0), (other, 1.0)):
        each |= {"run_cpu_s_per_call": (factor * drift).tolist(), "run_medians_s": drift.tolist()}
    assert speedup_of([eager, other], other).low == pytest.approx(3), "runs are used where there are several"  # type: ignore[union-attr]
    assert speedup_of([other], other) is None


@pytest.mark.parametrize(("eager", "other"), [(10, 3), (3, 10), (3, 3)])
def test_too_few_samples_for_a_median_leave_a_table_intact(eager: int, other: int) -> None:
    lines = row_table([row("torch", eager), row("onnx", other)]).splitlines()
    assert len(lines) == 4


def test_a_table_without_rows_is_a_header() -> None:
    assert len(row_table([]).splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--windows", "0"], "expected 1 or more windows"),
        (["--seconds", "-1"], "expected 1 or more windows of 0 or more seconds"),
        (["--seconds", "nan"], "expected 1 or more windows of 0 or more seconds"),
        (["--runs", "0"], "--runs: expected 1 or more, found 0"),
        (["--concurrency", "0"], "--concurrency: expected 1 or more, found 0"),
        (["--rate", "0"], "--rate: expected a number above 0, found 0"),
        (["--slo-ms", "inf"], "--slo-ms: expected a number above 0, found inf"),
        (
            ["policy_gur"],
            "expected a known published model, found 'policy_gur'; did you mean 'policy_gru'? publish it: ",
        ),
        (["--model", "policy_gur"], "expected a known published model, found 'policy_gur'"),
        (["--target", "tensorrt"], "expected artifacts that answer in one run on this machine"),
        (["--repository", "/nowhere"], "expected a folder with published artifacts at /nowhere, found nothing"),
        (["--out", "/nowhere/rows.json"], "expected a folder with room for the results at /nowhere, found nothing"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_measured(
    gru_repository: Path,
    capsys: pytest.CaptureFixture[str],
    started_pids: list[int],
    arguments: list[str],
    message: str,
) -> None:
    capsys.readouterr()
    assert bench.main(["--repository", str(gru_repository), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert started_pids == []


class TestServed:
    """Through a real Triton, started for the artifact."""

    pytestmark = needs_server()

    def test_a_served_artifact_is_measured_beside_the_engine_in_process(
        self, gru_repository: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        arguments = ["--repository", str(gru_repository), "--triton", "--windows", "1", "--seconds", "0.02", "--json"]
        assert bench.main([*arguments, "--scenario", "server", "--rate", "50"]) == 0
        own, served = json.loads(capsys.readouterr().out)["rows"]
        assert (own["engine"], served["engine"]) == ("onnx", "triton")
        assert served["provider"].startswith("triton ")
        assert served["memory_bytes"] > 50_000_000, "that of the server and its stub, not of the client"
        assert len(served["samples_s"]) == len(own["samples_s"]), "the same arrivals"
