"""The README in the model repository is no model: not for a command, not for Triton, not for make clean."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from export import verify
from export.all import main as export_all
from export.triton.lint import lint
from export.triton.repository import drafting, publish
from runtimes.repository import published, versions
from runtimes.runtime import open_runtime
from runtimes.triton.server import TritonServer
from runtimes.triton.version_watch import VersionWatch
from tests import toys

ROOT = Path(__file__).parents[3]
README = ROOT / "model_repository" / "README.md"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "model_repository").mkdir()
    shutil.copy(README, tmp_path / "model_repository")
    return tmp_path / "model_repository"


def test_git_has_the_readme_and_nothing_else_of_the_repository() -> None:
    def ignored(path: str) -> bool:
        asked = ["git", "check-ignore", "--quiet", "--no-index", path]
        return subprocess.run(asked, cwd=ROOT, check=False).returncode == 0

    assert not ignored("model_repository/README.md")
    assert ignored("model_repository/policy_gru_onnx/1/artifact.json")
    assert ignored("model_repository/NOTES.md")


def test_commands_see_an_empty_repository(repository: Path, checkpoints: Path) -> None:
    assert published(repository) == []
    assert lint(repository) == []
    assert verify.main(["--repository", str(repository)]) == 0
    places = ["--repository", str(repository), "--checkpoints", str(checkpoints)]
    assert export_all(["policy_gru", "--target", "onnx", "--dry-run", *places]) == 0
    assert [path.name for path in repository.iterdir()] == ["README.md"]


def test_clean_leaves_the_readme(repository: Path) -> None:
    (repository / "policy_gru_onnx" / "1").mkdir(parents=True)
    (repository / ".draft").touch()
    subprocess.run(["make", "--silent", "--file", ROOT / "Makefile", "clean"], cwd=repository.parent, check=True)
    assert [path.name for path in repository.iterdir()] == ["README.md"]
    assert (repository / "README.md").read_bytes() == README.read_bytes()


SLOW, WITH_SERVER = toys.needs_server()


@SLOW
@WITH_SERVER
@pytest.mark.parametrize("poll_s", [None, 1])
def test_triton_serves_the_models_beside_the_readme(repository: Path, poll_s: int | None) -> None:
    with drafting(repository) as draft:
        publish(draft, toys.make(draft, toys.DOUBLING), repository)
    assert [path.parent.name for path in published(repository)] == ["doubling_onnx"]
    assert VersionWatch(repository).look() == ["doubling_onnx"]
    with TritonServer(repository, poll_s=poll_s, strict=True) as server:
        assert [entry["name"] for entry in server.index()] == ["doubling_onnx"]
        (version,) = versions(repository / "doubling_onnx")
        with open_runtime(version, engine="triton", url=server.grpc_url) as runtime:
            x = np.ones((1, 4, 3), np.float32)
            np.testing.assert_array_equal(runtime.fresh({"x": x})["y"], 2 * x)
        assert "README" not in server.log_tail(2000)
