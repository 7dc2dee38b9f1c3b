"""A version that does not match its manifest is named before it is served, and no other one."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from export.triton.repository import drafting, publish, publish_ensemble
from runtimes import serve
from runtimes.artifact import MANIFEST
from runtimes.repository import versions
from runtimes.triton.version_watch import VersionWatch
from tests import toys


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Path]:
    """Two versions of a toy, and the ensemble that leads through it."""
    home = tmp_path / "model_repository"
    with toys.known_pipeline(tmp_path / "pipelines"):
        publish_toy(home)
        publish_toy(home)
        yield home


def publish_toy(home: Path, factor: float = 2.0) -> None:
    with drafting(home) as draft:
        artifact = toys.make(draft, toys.DOUBLING, factor=factor, key=f"of {factor}")
        publish(draft, artifact, home)
        publish_ensemble(artifact, home)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_what_was_published_has_no_problem(repository: Path) -> None:
    watch = VersionWatch(repository)
    assert watch.look() == ["doubling", "doubling_decode", "doubling_encode", "doubling_onnx"]
    assert (watch.look(), watch.problems) == ([], {})


@pytest.mark.parametrize(
    "place", ["doubling_onnx/2/model.onnx", "doubling_onnx/2/assets/unit.json", "doubling_encode/1/assets/unit.json"]
)
def test_a_flipped_byte_is_named_until_it_is_right_again(repository: Path, place: str) -> None:
    watch = VersionWatch(repository)
    flip_a_byte(repository / place)
    watch.look()
    ((model, problem),) = watch.problems.items()
    assert problem.startswith(f"{repository / place}: expected sha256 ")
    assert (watch.look(), len(watch.problems)) == ([], 1)
    flip_a_byte(repository / place)
    assert (watch.look(), watch.problems) == ([model], {})


@pytest.mark.parametrize("damage", [Path.unlink, flip_a_byte])
def test_a_version_with_no_good_manifest_is_named(repository: Path, damage: Callable[[Path], None]) -> None:
    damage(repository / "doubling_onnx" / "2" / MANIFEST)
    watch = VersionWatch(repository)
    watch.look()
    assert MANIFEST in watch.problems["doubling_onnx"]


def test_what_appears_changes_and_goes_is_told(repository: Path) -> None:
    watch = VersionWatch(repository)
    watch.look()
    publish_toy(repository, factor=3.0)
    assert "doubling_onnx" in watch.look()
    (repository / "doubling_encode" / "config.pbtxt").touch()
    assert watch.look() == ["doubling_encode"]
    shutil.rmtree(repository / "doubling_onnx")
    assert watch.look() == ["doubling_onnx"]
    assert "doubling_onnx" not in watch.known
    assert watch.problems == {}


def test_what_is_loaded_beside_the_newest_is_compared_and_what_is_older_is_not(repository: Path) -> None:
    publish_toy(repository, factor=3.0)
    onnx = [version / "model.onnx" for version in versions(repository / "doubling_onnx")]
    assert len(onnx) == 3
    flip_a_byte(onnx[0])
    watch = VersionWatch(repository)
    watch.look()
    assert watch.problems == {}
    flip_a_byte(onnx[1])
    watch.look()
    assert watch.problems["doubling_onnx"].startswith(f"{onnx[1]}: ")


def test_serve_refuses_it_before_anything_starts(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("SLIPWAY_TRITON_VENV", "/nowhere")
    damaged = repository / "doubling_onnx" / "2" / "model.onnx"
    flip_a_byte(damaged)
    assert serve.main(["--repository", str(repository)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {damaged}: expected sha256 ")
    assert printed.count("\n") == 1
    assert serve.main(["--repository", str(repository), "--unverified"]) == 2
    assert "expected a Triton server" in capsys.readouterr().err
