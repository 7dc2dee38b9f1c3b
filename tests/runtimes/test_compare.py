"""Comparisons: folders in interleaved runs, results files, verdicts and exit statuses."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes import compare
from runtimes.artifact import write_json
from runtimes.bench.load import Window
from runtimes.bench.measure import Measurement
from runtimes.bench.results import SCHEMA
from tests.toys import DOUBLING, checkout_with_pipeline, make

RUNS = 20


class Machine:
    """A stub of `Worker`: a run of a folder takes a second with noise, a fifth more in a folder named "slower".

    The noise is that of `test_statistics.rounds`: the machine becomes slower by half during the test.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.started = 0

    def __call__(self, root: Path, options: object, checkout: Path) -> "Machine":
        self.started += 1
        drift = np.exp(np.log(1.5) * self.started / (3 * RUNS))
        factor = 1.2 if "slower" in str(root) else 1.0
        worker = Machine(0)
        worker.seconds = factor * drift * np.exp(self.rng.normal(0, 0.03))  # type: ignore[attr-defined]
        return worker

    def prepare(self, sizes: Mapping[str, int]) -> Measurement:
        times = {"load_s": 0.0, "first_call_s": 0.0, "warmup_s": 0.0, "warmup_calls": 0}
        return Measurement(engine="toy", provider="toy", sizes=sizes, **times)  # type: ignore[arg-type]

    def window(self, load: object) -> Window:
        seconds: float = self.seconds  # type: ignore[attr-defined]
        return Window(samples_s=[seconds] * 9, wall_s=9 * seconds, cpu_s=9 * seconds)

    def close(self) -> None:
        pass


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Model repositories, each with one artifact."""
    found = {}
    for name in ("base", "same", "slower"):
        make(tmp_path / name / "doubling_onnx" / "1", DOUBLING)
        found[name] = tmp_path / name
    return found


@pytest.mark.parametrize("clock", compare.CLOCKS)
def test_a_planted_slowdown_is_found_and_an_a_a_comparison_finds_none(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, clock: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(20):
        for name, status in (("same", 0), ("slower", 1)):
            monkeypatch.setattr(compare, "Worker", Machine(seed))
            arguments = [str(folders["base"]), str(folders[name]), "--runs", str(RUNS), "--clock", clock]
            assert compare.main(arguments) == status, (seed, name, capsys.readouterr().out)
    assert capsys.readouterr().err == ""


def test_a_slowdown_within_the_tolerance_passes(folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for tolerated, status in (("5", 1), ("30", 0)):
        monkeypatch.setattr(compare, "Worker", Machine(0))
        arguments = [str(folders["base"]), str(folders["slower"]), "--runs", str(RUNS), "--fail-slower", tolerated]
        assert compare.main(arguments) == status


def test_a_cell_that_only_base_has_is_a_failure(
    folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(folders["same"] / "doubling_onnx", folders["same"] / "doubling_openvino")
    make(folders["same"] / "doubling_openvino" / "1", DOUBLING, target="openvino")
    monkeypatch.setattr(compare, "Worker", Machine(0))
    assert compare.main([str(folders["base"]), str(folders["same"]), "--json"]) == 1
    (cell,) = json.loads(capsys.readouterr().out)["cells"]
    assert (cell["verdict"], cell["reason"], cell["difference"]) == ("failed", "not in NEW", None)


@pytest.fixture
def checkouts(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkouts with the toy pipeline and its artifact; in the second every call of the engine takes 2 ms more."""
    made = [checkout_with_pipeline(tmp_path / name) for name in ("base", "new")]
    for checkout in made:
        make(checkout / "model_repository" / "doubling_onnx" / "1", DOUBLING)
    engine = made[1] / "runtimes" / "engines" / "onnxruntime.py"
    source = engine.read_text()
    call = "    def infer(self, inputs: Mapping[str, np.ndarray]) -> Tensors:\n"
    assert call in source
    engine.write_text(source.replace(call, call + "        import time\n        time.sleep(0.002)\n"))
    return made[0], made[1]


@pytest.mark.slow
def test_checkouts_are_measured_by_their_own_code_in_interleaved_runs(
    checkouts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A call takes some 20 microseconds, and 2 ms more in NEW: far beyond any noise."""
    out = tmp_path / "cells.json"
    arguments = ["--runs", "5", "--seconds", "0.01", "--out", str(out), "--json"]
    assert compare.main([*map(str, checkouts), *arguments]) == 1
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    assert result["schema"] == "slipway.compare/1"
    (cell,) = result["cells"]
    assert cell["verdict"] == "slower"
    assert cell["runs"] == 5
    assert cell["difference"]["low"] > 1


# Results files -------------------------------------------------------------------------------------------------------


def results(path: Path, factor: float, runs: int = 10, **changes: Any) -> str:
    """A results file with one row whose runs took `factor` seconds, 3 % apart."""
    medians = factor * np.exp(np.random.default_rng(0).normal(0, 0.03, runs))
    row = {
        **{"model": "toy", "target": "onnx", "precision": "fp32", "engine": "onnx", "scenario": "single-stream"},
        **{
            "sizes": {"batch": 1},
            "run_medians_s": medians.tolist(),
            "run_cpu_s_per_call": [1.0] * runs,
            "cpu_s_per_call": 1.0,
        },
    }
    write_json(path, {"schema": SCHEMA, "environment": {}, "rows": [row | changes]})
    return str(path)


def test_results_files_are_compared_by_the_medians_of_their_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, same, slow = (results(tmp_path / f"{factor}.json", factor) for factor in (1.0, 1.01, 1.2))
    assert compare.main([base, same]) == 0
    assert compare.main([base, slow]) == 1
    assert compare.main([base, slow, "--clock", "cpu"]) == 0
    failed = results(tmp_path / "failed.json", 1.0, failed="no such engine")
    capsys.readouterr()
    assert compare.main([base, failed]) == 1
    assert "no such engine" in capsys.readouterr().out
    assert compare.main([failed, base]) == 2, "a failed row of BASE is not compared"


def test_files_with_medians_of_other_windows_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, older = results(tmp_path / "base.json", 1.0), Path(results(tmp_path / "older.json", 1.0))
    older.write_text(older.read_text().replace(SCHEMA, "slipway.bench/1"))
    assert compare.main([str(older), str(older)]) == 0
    assert compare.main([str(older), base]) == 2
    assert "expected files of one schema, found slipway.bench/1, slipway.bench/2; measure" in capsys.readouterr().err


def test_a_row_is_compared_with_itself_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = results(tmp_path / "base.json", 1.0)
    other = results(tmp_path / "other.json", 1.0, sizes={"batch": 2})
    assert compare.main([base, other, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["cells"][0]["reason"] == "not in NEW"


@pytest.mark.parametrize(
    ("make_arguments", "message"),
    [
        (lambda base, folder: [base, base, "--runs", "4"], "--runs: expected 5 or more, found 4"),
        (lambda base, folder: [base, base, "--fail-slower", "-1"], "expected a percentage of 0 or more, found -1.0"),
        (lambda base, folder: [base, base, "--fail-slower", "nan"], "expected a percentage of 0 or more, found nan"),
        (lambda base, folder: [base, folder], "expected two folders or two results files"),
        (lambda base, folder: [folder, folder], "expected a cell in both"),
        (lambda base, folder: [base, "/nowhere"], "expected two folders or two results files"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_arguments: Any, message: str
) -> None:
    base, folder = results(tmp_path / "base.json", 1.0), tmp_path / "empty"
    folder.mkdir()
    assert compare.main(make_arguments(base, str(folder))) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_too_few_runs_in_a_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = results(tmp_path / "few.json", 1.0, runs=4)
    assert compare.main([few, few]) == 2
    assert "expected 5 or more runs of each row, found 4; measure with --runs 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", '{"schema": "slipway.bench/1"}', '{"schema": "slipway.bench/1", "rows": [{}], "environment": {}}'],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert compare.main([str(path), str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path}: expected ")
