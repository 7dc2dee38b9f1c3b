"""Measuring: percentiles that n allows, engines in processes that may die, results in the published schema."""

import json
import os
import signal
from collections.abc import Iterator
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from export import all as export_all
from runtimes import bench, measure
from runtimes.artifact import Artifact
from runtimes.base import open_runtime
from runtimes.errors import EngineError
from runtimes.measure import SAMPLES_FOR, Measurement, Worker, example_feeds, percentile, prepare
from runtimes.repository import find

MODEL = "policy_gru"
STEP, WINDOW = {"batch": 1, "time": 1}, {"batch": 8, "time": 30}
KEYS = {
    *("model", "target", "precision", "engine", "scenario", "sizes", "load_s", "first_call_s", "p50_s", "p90_s"),
    *("p95_s", "p99_s", "rows_per_s", "memory_bytes", "agreement", "samples_s"),
}


@pytest.fixture(scope="module")
def repository(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with one policy in ONNX."""
    folder = tmp_path_factory.mktemp("measured") / "repository"
    places = ["--checkpoints", str(checkpoints), "--repository", str(folder)]
    assert export_all.main(["--target", "onnx", "--model", MODEL, *places]) == 0
    return folder


@pytest.fixture(scope="module")
def root(repository: Path) -> Path:
    return find(repository, f"{MODEL}_onnx")


@pytest.fixture
def worker(root: Path) -> Iterator[Worker]:
    worker = Worker(root, STEP, {})
    yield worker
    worker.close()


def measurement(blocks: list[list[float]], batch: int = 1) -> Measurement:
    return Measurement(
        engine="toy",
        provider="toy",
        sizes={"batch": batch},
        load_s=0.5,
        first_call_s=0.1,
        warmup_s=0.2,
        memory_bytes=10_000_000,
        latency_s=blocks,
    )


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", SAMPLES_FOR)
def test_a_percentile_needs_as_many_samples_as_its_confidence(p: int) -> None:
    """The chance that all n samples lie below the p-th percentile is p ** n, and must be 1 % or less."""
    needed = next(n for n in range(1, 10_000) if (p / 100) ** n <= 0.01)
    samples = np.random.default_rng(0).exponential(size=needed).tolist()
    assert percentile(samples[:-1], p) is None
    assert percentile(samples, p) == pytest.approx(np.percentile(samples, p))
    assert percentile([], p) is None


def test_throughput_counts_the_rows_of_the_batch_over_the_time_in_calls() -> None:
    assert measurement([[0.1, 0.3], [0.1]], batch=8).rows_per_s == pytest.approx(8 * 3 / 0.5)
    assert measurement([[0.1, 0.3], [0.1]]).samples_s == [0.1, 0.3, 0.1]


@pytest.mark.parametrize(
    ("medians", "stable"),
    [
        ([1.0, 1.05, 1.09], True),
        ([1.0, 1.05, 1.11], False),
        ([9.0, 1.0, 1.0, 1.0], True),
        ([1.0, 1.0], False),
        ([], False),
    ],
)
def test_stable_means_the_last_three_blocks_agree(medians: list[float], stable: bool) -> None:
    assert measurement([[median] * 5 for median in medians]).stable is stable


# What is called ------------------------------------------------------------------------------------------------------


def test_the_example_is_repeated_to_the_sizes(root: Path) -> None:
    with open_runtime(root) as runtime:
        for sizes in (STEP, WINDOW, {"batch": 3, "time": 31}):
            frames = example_feeds(runtime, sizes)["frames"]
            assert frames.shape[:2] == (sizes["batch"], sizes["time"])
            runtime.fresh({"frames": frames})
        one = example_feeds(runtime, {"batch": 1, "time": 2})["frames"]
        np.testing.assert_array_equal(
            example_feeds(runtime, {"batch": 3, "time": 4})["frames"], np.tile(one, (3, 2, 1))
        )


def test_a_call_at_time_one_is_the_next_step_and_a_window_begins_anew(root: Path) -> None:
    with open_runtime(root) as runtime:
        step, window = prepare(runtime, STEP), prepare(runtime, WINDOW)
        assert not np.array_equal(step()["main_x"], step()["main_x"])
        np.testing.assert_array_equal(window()["main_x"], window()["main_x"])


# Processes -----------------------------------------------------------------------------------------------------------


def gone(pid: int | None) -> bool:
    """Neither alive nor a zombie."""
    return not Path(f"/proc/{pid}").exists()


def test_a_worker_measures_in_blocks(worker: Worker) -> None:
    worker.measure_block(0.02)
    worker.measure_block(0.0)
    found = worker.measurement
    assert (found.engine, found.provider, dict(found.sizes)) == ("onnxruntime", "CPUExecutionProvider", STEP)
    assert len(found.latency_s) == 2
    assert len(found.latency_s[0]) > 1
    assert len(found.latency_s[1]) == 1, "a block has one sample at least"
    assert 0.015 < sum(found.latency_s[0]) < 5
    assert all(sample > 0 for sample in found.samples_s)
    assert found.load_s > 0
    assert found.first_call_s > 0
    assert found.warmup_s >= measure.WARMUP_S
    assert found.memory_bytes > 10_000_000


def test_a_closed_worker_leaves_no_process(root: Path) -> None:
    worker = Worker(root, STEP, {})
    pid = worker._process.pid
    assert not gone(pid)
    worker.close()
    assert gone(pid)
    worker.close()


def test_an_engine_that_cannot_open_says_why(root: Path, pids: list[int]) -> None:
    with pytest.raises(EngineError, match="engine onnxruntime: expected a device of cpu, cuda here, found 'tpu'"):
        Worker(root, STEP, {"device": "tpu"})
    assert len(pids) == 1
    assert gone(pids[0])


def test_sizes_that_an_artifact_does_not_have_are_named(root: Path) -> None:
    with pytest.raises(EngineError, match=r"time 1\.\.512"):
        Worker(root, {"batch": 1, "time": 513}, {})


@pytest.fixture
def pids(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The processes that workers of this test started."""
    started: list[int] = []
    start = SpawnProcess.start

    def remember(self: Any) -> None:
        start(self)
        started.append(self.pid)

    monkeypatch.setattr(SpawnProcess, "start", remember)
    return started


def test_a_worker_killed_while_it_opens_is_one_line_and_no_zombie(
    root: Path, pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = SpawnProcess.start

    def start_and_kill(self: Any) -> None:
        start(self)
        os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(SpawnProcess, "start", start_and_kill)
    with pytest.raises(EngineError, match="the engine's process died with status -9"):
        Worker(root, STEP, {})
    assert gone(pids[0])


def test_a_worker_killed_between_blocks_is_one_line_and_no_zombie(worker: Worker) -> None:
    worker.measure_block(0)
    pid = worker._process.pid
    os.kill(pid, signal.SIGKILL)
    worker._process.join()
    with pytest.raises(EngineError, match="the engine's process died with status -9"):
        worker.measure_block(0)
    assert gone(pid)


def test_a_worker_killed_within_a_block_is_one_line_and_no_zombie(worker: Worker) -> None:
    pid = worker._process.pid
    worker._pipe.send(30.0)  # busy for half a minute
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="the engine's process died with status -9"):
        worker._receive(30)
    assert gone(pid)


def test_a_worker_that_answers_too_late_is_not_left_running(
    root: Path, pids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "START_TIMEOUT_S", 0.01)
    with pytest.raises(EngineError, match=r"expected an answer within 0\.01 s, found none"):
        Worker(root, STEP, {})
    assert gone(pids[0])


# Results -------------------------------------------------------------------------------------------------------------


def test_bench_writes_the_documented_schema(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], pids: list[int]
) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--repository", str(repository), "--rounds", "3", "--seconds", "0.03", "--out", str(out), "--json"]
    capsys.readouterr()
    assert bench.main(arguments) == 0
    data = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out)["rows"] == data["rows"]
    assert set(data) == {"schema", "environment", "rows"}
    assert data["schema"] == "slipway.bench/1"
    assert data["environment"]["threads"] == 1
    assert [row["sizes"] for row in data["rows"]] == [STEP, WINDOW]
    for row in data["rows"]:
        assert row.keys() >= KEYS
        assert (row["model"], row["target"], row["precision"], row["engine"]) == (MODEL, "onnx", "fp32", "onnx")
        samples = row["samples_s"]
        for p, needed in SAMPLES_FOR.items():
            want = np.percentile(samples, p) if len(samples) >= needed else None
            assert row[f"p{p}_s"] == (want if want is None else pytest.approx(want))
        assert row["rows_per_s"] == pytest.approx(row["sizes"]["batch"] * len(samples) / sum(samples))
        assert row["agreement"] == 1.0
    assert all(gone(pid) for pid in pids)


def test_an_engine_that_fails_or_dies_costs_its_own_row(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = Artifact.load(root)
    subjects = [
        bench.Subject(artifact=artifact, root=root, label=label, options=options)
        for label, options in (("torch", {}), ("dies", {}), ("tpu", {"device": "tpu"}))
    ]
    made: list[Worker] = []
    measure_block = Worker.measure_block

    def die_once(self: Worker, seconds: float) -> None:
        if self not in made:
            made.append(self)
        if len(made) == 2 and self is made[1]:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.join()
        measure_block(self, seconds)

    monkeypatch.setattr(Worker, "measure_block", die_once)
    monkeypatch.setattr(bench, "sizes_of", lambda artifact: [STEP])
    rows = list(bench.measure(subjects, seconds=0.01, rounds=3))
    assert [row["engine"] for row in rows] == ["torch", "dies", "tpu"]
    assert rows[0]["rows_per_s"] > 0
    assert rows[1]["failed"] == "the engine's process died with status -9"
    assert "found 'tpu'" in rows[2]["failed"]
    table = bench.row_table(rows).splitlines()
    assert len(table) == 5
    assert table[2].split()[-2:] == ["1.00", "1.000"] or "unstable" in table[2]
    assert table[3].endswith("the engine's process died with status -9")


def row(engine: str, samples: int, seconds: float = 0.002) -> dict[str, Any]:
    artifact: Any = SimpleNamespace(model=MODEL, target="onnx", precision="fp32", parity={})
    subject = bench.Subject(artifact=artifact, root=Path(), label=engine)
    return bench.row(subject, STEP, measurement([[seconds] * samples]))


def test_a_table_says_how_many_times_as_fast_as_eager_each_engine_is() -> None:
    header, _, eager, onnx = bench.row_table([row("torch", 10, 0.004), row("onnx", 10, 0.002)]).splitlines()
    end = header.index("x eager") + len("x eager")
    assert [line[:end].split()[-1] for line in (eager, onnx)] == ["1.00", "2.00"]


@pytest.mark.parametrize(("eager", "other"), [(10, 3), (3, 10), (3, 3)])
def test_a_table_copes_with_too_few_samples_for_a_median(eager: int, other: int) -> None:
    lines = bench.row_table([row("torch", eager), row("onnx", other)]).splitlines()
    assert len(lines) == 4


def test_a_table_without_rows_is_a_header() -> None:
    assert len(bench.row_table([]).splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "expected 1 or more rounds"),
        (["--seconds", "-1"], "expected 1 or more rounds of 0 or more seconds"),
        (["--seconds", "nan"], "expected 1 or more rounds of 0 or more seconds"),
        (["--model", "policy_rnn"], "expected artifacts that can run here"),
        (["--repository", "/nowhere"], "expected a folder with published artifacts at /nowhere, found nothing"),
        (["--out", "/nowhere/rows.json"], "expected a folder with room for the results at /nowhere, found nothing"),
    ],
)
def test_a_wrong_command_line_is_refused_before_anything_is_measured(
    repository: Path, capsys: pytest.CaptureFixture[str], pids: list[int], arguments: list[str], message: str
) -> None:
    capsys.readouterr()
    assert bench.main(["--repository", str(repository), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert pids == []
