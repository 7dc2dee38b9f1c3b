"""slipway list: models, their checkpoints and published artifacts, with what is damaged or older named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slipway.command import main
from tests.exported import Exports
from training.checkpoint import Checkpoint
from training.spec import find_spec

NAMES = {"hnet", "hnet_step", "policy_gru", "policy_mamba", "statements", "strategy", "hallucination"}


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    assert main(["list", *arguments, "--json"]) == 0
    return {model["model"]: model for model in json.loads(capsys.readouterr().out)["models"]}


@pytest.fixture
def repository(exports: Exports, tmp_path: Path) -> Path:
    """policy_gru for onnx, which is served, and for torch, which is not."""
    assert exports.cells("policy_gru", ["onnx", "torch"])["torch"]["status"] == "ok"
    source = exports.folder / "policy_gru" / "repository"
    shutil.copytree(source, tmp_path / "repository")
    shutil.copytree(source.with_name(".repository"), tmp_path / ".repository")
    return tmp_path / "repository"


def test_without_anything_every_model_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--checkpoints", str(tmp_path / "c"), "--repository", str(tmp_path / "r")]
    found = listed(capsys, *places)
    assert found.keys() >= NAMES
    assert all(not model["checkpoint"] and not model["artifacts"] for model in found.values())
    assert found["hnet_step"]["checkpoint_of"] == "hnet"
    assert main(["list", *places]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + len(found)
    assert all("not trained" in line and "not published" in line for line in lines[2:])


def test_artifacts_show_target_precision_version_and_whether_they_are_served(
    repository: Path, checkpoints: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--checkpoints", str(checkpoints), "--repository", str(repository)]
    model = listed(capsys, "policy_gru", *places)["policy_gru"]
    digest = Checkpoint.load(checkpoints / "policy_gru").digest
    assert (model["checkpoint"], model["preset"], model["step"]) == (digest, "tiny", 7)
    by_target = {each["target"]: each for each in model["artifacts"]}
    assert {"onnx", "torch"} <= by_target.keys()
    assert (by_target["onnx"]["served"], by_target["torch"]["served"]) == (True, False)
    for each in by_target.values():
        assert (each["precision"], each["version"], each["current"], each["problem"]) == ("fp32", 1, True, "")
        assert each["bytes"] > 1000
    assert main(["list", "policy_gru", *places]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " onnx " in line)
    assert line.split()[:7] == ["policy_gru", "tiny", digest[:12], "onnx", "fp32", "1", "yes"]


def test_an_artifact_of_another_checkpoint_is_marked(
    repository: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.conftest import write_untrained

    write_untrained(find_spec("policy_gru"), tmp_path / "newer" / "policy_gru", {"layers": 2})
    places = ["--checkpoints", str(tmp_path / "newer"), "--repository", str(repository)]
    assert {each["current"] for each in listed(capsys, "policy_gru", *places)["policy_gru"]["artifacts"]} == {False}
    assert main(["list", "policy_gru", *places]) == 0
    assert "made from another checkpoint; export again" in capsys.readouterr().out


def test_a_damaged_manifest_is_listed_with_its_problem(
    repository: Path, checkpoints: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = repository / "policy_gru_onnx" / "1" / "artifact.json"
    manifest.write_text(manifest.read_text().replace('"fp32"', '"fp16"', 1))
    shutil.copytree(checkpoints / "policy_lstm", tmp_path / "c" / "policy_lstm")
    (tmp_path / "c" / "policy_lstm" / "checkpoint.json").write_text("{}")
    found = listed(capsys, "--checkpoints", str(tmp_path / "c"), "--repository", str(repository))
    onnx = next(each for each in found["policy_gru"]["artifacts"] if each["artifact"] == "policy_gru_onnx")
    assert "expected sha256" in onnx["problem"]
    assert "expected format" in found["policy_lstm"]["problem"]


def test_an_artifact_of_a_model_that_is_not_defined_here_is_listed(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slipway.inventory.all_specs", lambda: {"hnet": find_spec("hnet")})
    found = listed(capsys, "--checkpoints", str(tmp_path), "--repository", str(repository))
    assert found.keys() == {"hnet", "policy_gru"}
    assert {each["current"] for each in found["policy_gru"]["artifacts"]} == {None}


def test_an_unknown_model_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "policy_gur"]) == 2
    assert "did you mean 'policy_gru'" in capsys.readouterr().err
