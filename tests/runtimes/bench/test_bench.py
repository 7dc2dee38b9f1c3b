"""The suite: who takes turns for how long, results in the published schema, tables, the command line."""

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
from runtimes.bench import interleave, suite
from runtimes.bench.interleave import Settings, Subject, Taken, joined
from runtimes.bench.load import Window
from runtimes.bench.measure import Measurement, Worker
from runtimes.bench.results import counted_samples, load_results, row_table, times_eager
from runtimes.bench.statistics import SAMPLES_FOR
from runtimes.host.memory_sampler import Peak
from runtimes.repository import find
from runtimes.runtime import DEVICES, device_for
from tests.toys import DOUBLING, gone, make, needs_server

MODEL = "policy_gru"
TOY: Any = SimpleNamespace(name="toy", parity={}, model="toy", target="onnx", precision="fp32", checkpoint="1")
STEP, WINDOW = {"batch": 1, "time": 1}, {"batch": 8, "time": 30}
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


def measurement(windows: list[list[float]], batch: int = 1) -> Measurement:
    return Measurement(
        engine="toy",
        provider="toy",
        sizes={"batch": batch},
        load_s=0.5,
        first_call_s=0.1,
        warmup_s=0.2,
        warmup_calls=10,
        memory=Peak(memory_bytes=10_000_000),
        windows=[Window(samples_s=each, wall_s=sum(each), cpu_s=2 * sum(each)) for each in windows],
    )


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
    arguments = ["--repository", str(gru_repository), "--rounds", "3", "--seconds", "0.03", "--runs", "2"]
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


def test_what_was_measured_before_an_interruption_is_kept(
    gru_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Iterator[dict[str, Any]]:
        yield row("onnx", 10)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    assert bench.main(["--repository", str(gru_repository), "--out", str(tmp_path / "rows.json")]) == 130
    assert len(load_results(tmp_path / "rows.json")["rows"]) == 1


def test_a_row_that_failed_is_in_the_status_and_costs_no_other(
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


def test_every_scenario_has_its_rows(gru_repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    more = [
        "--scenario",
        "offline",
        "--scenario",
        "server",
        "--scenario",
        "concurrency",
        "--lanes",
        "1",
        "--lanes",
        "2",
    ]
    rates = ["--rate", "100", "--bound-ms", "10000"]
    arguments = ["--repository", str(gru_repository), "--rounds", "1", "--seconds", "0.01", "--json", *more, *rates]
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


@pytest.mark.parametrize(("rounds", "most", "expected"), [(2, 9, 4), (2, 3, 3), (6, 9, 6)])
def test_an_engine_has_turns_until_it_is_stable_or_has_had_the_most(
    rounds: int, most: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first window is twice as slow: four windows end in three alike."""
    subject = Subject(artifact=TOY, root=Path(), label="onnx")

    class Toy:
        def __init__(self, subject: Subject, sampler: object) -> None:
            self.subject, self.result = subject, measurement([])

        def prepare(self, sizes: object) -> None:
            pass

        def window(self, load: object) -> None:
            seconds = 1.0 if self.result.windows else 2.0
            self.result.windows.append(Window(samples_s=[seconds] * 9, wall_s=9 * seconds, cpu_s=0))

        def close(self) -> None:
            pass

    monkeypatch.setattr(interleave, "Entrant", Toy)
    settings = Settings(rounds=rounds, most_rounds=most)
    monkeypatch.setattr(suite, "request_sizes", lambda artifact: {"batch": 1})
    toy = interleave.Turns([subject], sampler=None, settings=settings)  # type: ignore[arg-type]

    def points(entrants: Any) -> Iterator[list[Taken]]:
        toy.point(entrants, STEP, interleave.always({}))
        yield suite._taken(entrants, "single-stream", STEP)

    ((row,),) = toy.run(points)
    assert len(row["windows"]) == len(row["counted"]) == expected
    assert row["counted"][0] is (expected < 4), "what came before the steady stretch does not count"
    assert row["stable"] is (expected >= 4)


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
    rows = list(suite.measure(subjects, ["single-stream"], Settings(seconds=0.01, rounds=3, most_rounds=3)))[:3]
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
    return joined([Taken(subject=subject, scenario="single-stream", sizes=STEP, more={}, result=result)])


def test_an_engine_without_a_gpu_is_measured_on_the_cpu_and_its_row_says_so(tmp_path: Path) -> None:
    """With one engine refusing the device, a benchmark on a GPU would always fail."""
    engines = {"torch": "torch", "onnx": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt"}
    for target, engine in engines.items():
        make(tmp_path / f"doubling_{target}" / "1", DOUBLING, target=target, runtime=engine)
    for wanted, expected in (
        ("cuda", {"torch": "cuda", "torch.compile": "cuda", "onnx": "cuda", "openvino": "cpu", "tensorrt": "cuda"}),
        ("cpu", {"torch": "cpu", "torch.compile": "cpu", "onnx": "cpu", "openvino": "cpu", "tensorrt": "cuda"}),
    ):
        subjects = list(suite.choose(tmp_path, [], [], {"device": wanted, "threads": 1}))
        point = {"scenario": "offline", "sizes": {"batch": 1}, "more": {}, "result": measurement([[0.1]])}
        rows = [joined([Taken(subject=each, **point)]) for each in subjects]
        assert {row["engine"]: row["device"] for row in rows} == expected
        assert {each.label: each.options["device"] for each in subjects} == expected
        assert all(each.options["threads"] == 1 for each in subjects)


def test_what_generates_is_left_out(tmp_path: Path) -> None:
    make(tmp_path / "doubling_torch" / "1", DOUBLING, target="torch", runtime="torch", pipeline="hallucination_aarf")
    make(tmp_path / "doubling_onnx" / "1", DOUBLING)
    found = suite.choose(tmp_path, [], [], {"device": "cpu"})
    assert [subject.artifact.target for subject in found] == ["onnx"]


@pytest.mark.parametrize("engine", plugins.names("runtimes.engines"))
def test_the_device_an_engine_is_measured_on_is_one_it_has(engine: str) -> None:
    has = plugins.load("runtimes.engines", engine, "RUNTIME").devices
    assert has
    assert all(device_for(engine, wanted) in has for wanted in DEVICES)


def test_a_row_tells_what_the_conversion_cost() -> None:
    found = row("onnx", 10)
    assert (found["agreement"], found["agreement_check"], found["difference"]) == (0.5, "same", 0.1)


def test_a_table_says_how_many_times_as_fast_as_eager_each_engine_is() -> None:
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
        assert ("no torch eager of the same checkpoint" in capsys.readouterr().err) == found


@pytest.mark.parametrize(("eager", "other"), [(10, 3), (3, 10), (3, 3)])
def test_a_table_copes_with_too_few_samples_for_a_median(eager: int, other: int) -> None:
    lines = row_table([row("torch", eager), row("onnx", other)]).splitlines()
    assert len(lines) == 4


def test_a_table_without_rows_is_a_header() -> None:
    assert len(row_table([]).splitlines()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "expected 1 or more rounds"),
        (["--seconds", "-1"], "expected 1 or more rounds of 0 or more seconds"),
        (["--seconds", "nan"], "expected 1 or more rounds of 0 or more seconds"),
        (["--runs", "0"], "--runs: expected 1 or more, found 0"),
        (["--lanes", "0"], "--lanes: expected 1 or more, found 0"),
        (["--rate", "0"], "--rate: expected a number above 0, found 0"),
        (["--bound-ms", "inf"], "--bound-ms: expected a number above 0, found inf"),
        (["--model", "policy_rnn"], "expected artifacts that answer in one run here"),
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
        arguments = ["--repository", str(gru_repository), "--triton", "--rounds", "1", "--seconds", "0.02", "--json"]
        assert bench.main([*arguments, "--scenario", "server", "--rate", "50"]) == 0
        own, served = json.loads(capsys.readouterr().out)["rows"]
        assert (own["engine"], served["engine"]) == ("onnx", "triton")
        assert served["provider"].startswith("triton ")
        assert served["memory_bytes"] > 50_000_000, "that of the server and its stub, not of the client"
        assert len(served["samples_s"]) == len(own["samples_s"]), "the same arrivals"
