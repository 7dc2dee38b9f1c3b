"""What does not fit its manifest is named before it is served, once, and nothing else is."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import toys

from export.repository import drafting, publish, publish_ensemble
from runtimes import serve
from runtimes.artifact import MANIFEST
from runtimes.version_watch import VersionWatch


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Path]:
    """Two versions of a toy, and the ensemble that leads through it."""
    home = tmp_path / "model_repository"
    with toys.known_pipeline(tmp_path / "pipelines"):
        publish_toy(home)
        publish_toy(home)
        yield home


def publish_toy(home: Path) -> Path:
    with drafting(home) as draft:
        artifact = toys.make(draft, toys.DOUBLING)
        version = publish(draft, artifact, home)
        publish_ensemble(artifact, home)
    return version


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_published_has_no_problem(repository: Path) -> None:
    assert list(VersionWatch(repository).problems()) == []


@pytest.mark.parametrize(
    "place", ["doubling_onnx/2/model.onnx", "doubling_onnx/2/assets/unit.json", "doubling_encode/1/assets/unit.json"]
)
def test_a_flipped_byte_is_named_once(repository: Path, place: str) -> None:
    watch = VersionWatch(repository)
    flip_a_byte(repository / place)
    (problem,) = watch.problems()
    assert problem.startswith(f"{repository / place}: expected sha256 ")
    assert list(watch.problems()) == []


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_byte])
def test_a_version_with_no_good_manifest_is_named(repository: Path, damage: Callable[[Path], None]) -> None:
    damage(repository / "doubling_onnx" / "2" / MANIFEST)
    (problem,) = VersionWatch(repository).problems()
    assert MANIFEST in problem


def test_what_appears_or_changes_later_is_compared_then(repository: Path) -> None:
    watch = VersionWatch(repository)
    assert list(watch.problems()) == []
    version = publish_toy(repository)
    assert list(watch.problems()) == []
    flip_a_byte(version / "model.onnx")
    assert len(list(watch.problems())) == 1
    flip_a_byte(version / "model.onnx")
    assert list(watch.problems()) == []


def test_an_old_version_that_is_not_served_is_not_read(repository: Path) -> None:
    flip_a_byte(repository / "doubling_onnx" / "1" / "model.onnx")
    assert list(VersionWatch(repository).problems()) == []


def test_serve_refuses_it_before_anything_starts(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLIPWAY_TRITON_VENV", "/nowhere")
    damaged = repository / "doubling_onnx" / "2" / "model.onnx"
    flip_a_byte(damaged)
    assert serve.main(["--repository", str(repository)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {damaged}: expected sha256 ")
    assert said.count("\n") == 1
    assert serve.main(["--repository", str(repository), "--unverified"]) == 2
    assert "expected a Triton server" in capsys.readouterr().err
