"""An ensemble names the versions of its steps, and a server loads the one before as well where it can."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from export.triton.lint import lint
from export.triton.repository import publish_ensemble, reschedule
from export.triton.scheduling import Scheduling
from export.triton.schema import read_config
from runtimes.artifact import FORMAT, Artifact, write_manifest
from runtimes.tensors import Signature
from tests import toys
from tests.export.triton.test_repository import publish_all, publish_toy, snapshot


@pytest.fixture
def repository(tmp_path: Path) -> Iterator[Path]:
    with toys.known_pipeline(tmp_path / "plugins"):
        yield tmp_path / "model_repository"


def pins(repository: Path, model: str = "running") -> dict[str, int]:
    steps = read_config(repository / model).ensemble_scheduling.step
    return {step.model_name.removeprefix(f"{model}_"): step.model_version for step in steps}


def loaded(repository: Path, model: str) -> int:
    return int(read_config(repository / model).version_policy.latest.num_versions)


def test_an_ensemble_names_the_versions_that_were_made_for_each_other(repository: Path) -> None:
    publish_all(repository)
    assert pins(repository) == {"encode": 1, "onnx": 1, "decode": 1}
    (repository / "running_decode" / "1" / "model.py").write_text("an older one")
    publish_ensemble(Artifact.load(repository / "running_onnx" / "1"), repository)
    assert pins(repository) == {"encode": 1, "onnx": 1, "decode": 2}
    before = snapshot(repository)
    publish_toy(repository, toys.RUNNING, key="other")
    changed = {path for path, stat in snapshot(repository).items() if before.get(path) != stat}
    assert all(path.startswith("running_onnx/2") for path in changed), "the ensemble goes on as it was"
    publish_ensemble(Artifact.load(repository / "running_onnx" / "2"), repository)
    assert pins(repository) == {"encode": 2, "onnx": 2, "decode": 3}
    assert lint(repository) == []


def test_the_version_before_is_loaded_as_well_where_it_can_be(repository: Path) -> None:
    """All versions of a model have one config, and Triton loads all or none."""
    models = ("doubling_onnx", "doubling_encode", "doubling_decode")

    def loaded_after(signature: Signature, **changes: object) -> set[int]:
        publish_all(repository, signature, **changes)
        return {loaded(repository, model) for model in models}

    smaller = Signature(inputs=(toys.X,), outputs=(toys.Y,), axes=toys.AXES)
    assert loaded_after(toys.DOUBLING, key="a") == {2}
    assert loaded_after(toys.DOUBLING, key="b") == {2}
    assert loaded_after(smaller, key="c") == {1}
    reschedule(Artifact.load(repository / "doubling_onnx" / "3"), repository, Scheduling())
    assert {loaded(repository, model) for model in models} == {1}
    assert loaded_after(smaller, key="d") == {2}
    assert loaded_after(smaller, key="e", built_with={"onnx": "newer"}) == {1}
    (repository / "doubling_onnx" / "5" / "model.onnx").write_bytes(b"damaged")
    assert loaded_after(smaller, key="f", built_with={"onnx": "newer"}) == {1, 2}
    assert loaded(repository, "doubling_onnx") == 1
    write_manifest(repository / "doubling_onnx" / "6" / "artifact.json", FORMAT, {"model": "of an earlier version"})
    publish_toy(repository, smaller, key="g", built_with={"onnx": "newer"})
    assert loaded(repository, "doubling_onnx") == 1


def test_an_ensemble_of_before_versions_were_named_is_right_until_the_next_export(repository: Path) -> None:
    publish_all(repository)
    ensemble = repository / "running" / "config.pbtxt"
    ensemble.write_text(ensemble.read_text().replace("model_version: 1", "model_version: -1"))
    for name in ("onnx", "encode", "decode"):
        config = repository / f"running_{name}" / "config.pbtxt"
        config.write_text(config.read_text().replace("num_versions: 2", "num_versions: 1"))
    assert (pins(repository)["onnx"], loaded(repository, "running_onnx"), lint(repository)) == (-1, 1, [])
    reschedule(Artifact.load(repository / "running_onnx" / "1"), repository, Scheduling())
    assert (pins(repository)["onnx"], loaded(repository, "running_onnx"), lint(repository)) == (1, 2, [])
