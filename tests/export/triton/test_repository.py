"""A repository holds complete models only, also after an interruption; the linter finds planted faults."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from export.triton.ensemble import is_ensemble_target
from export.triton.lint import lint
from export.triton.repository import drafting, publish, publish_ensemble, reschedule
from export.triton.scheduling import Scheduling
from runtimes.artifact import FORMAT, Artifact, write_manifest
from runtimes.errors import ArtifactError
from runtimes.repository import newest, published
from runtimes.tensors import Axis, Signature
from tests import toys

ROOT = Path(__file__).parents[3]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "model_repository"


@pytest.fixture(autouse=True)
def with_pipeline(tmp_path: Path) -> Iterator[None]:
    with toys.known_pipeline(tmp_path / "plugins"):
        yield


def publish_toy(repository: Path, signature: Signature = toys.DOUBLING, served: bool = True, **changes: object) -> Path:
    with drafting(repository) as draft:
        return publish(draft, toys.make(draft, signature, **changes), repository, served=served)


def publish_all(repository: Path, signature: Signature = toys.RUNNING, **changes: object) -> None:
    version = publish_toy(repository, signature, **changes)
    publish_ensemble(Artifact.load(version), repository)


def snapshot(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Every path below a folder, a file with its inode and modification time."""
    stats = {str(path.relative_to(folder)): path.stat() if path.is_file() else None for path in folder.rglob("*")}
    return {path: (stat.st_ino, stat.st_mtime_ns) if stat else None for path, stat in stats.items()}


def test_a_published_model_is_whole_and_nothing_else_lies_in_the_repository(repository: Path) -> None:
    version = publish_toy(repository)
    assert version == repository / "doubling_onnx" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["artifact.json", "assets", "model.onnx"]
    assert [path.name for path in repository.iterdir()] == ["doubling_onnx"]
    Artifact.load(version).verify_files(version)


def test_the_three_newest_versions_are_kept(repository: Path) -> None:
    for key in "abcd":
        publish_toy(repository, key=key)
    assert sorted(path.name for path in (repository / "doubling_onnx").iterdir()) == ["2", "3", "4", "config.pbtxt"]
    assert newest(repository, "doubling_onnx") == repository / "doubling_onnx" / "4"


def test_an_unchanged_config_is_not_touched(repository: Path) -> None:
    publish_toy(repository)
    before = (repository / "doubling_onnx" / "config.pbtxt").stat().st_ino
    publish_toy(repository, key="other")
    assert (repository / "doubling_onnx" / "config.pbtxt").stat().st_ino == before


def test_an_equal_config_in_another_spelling_is_not_touched(repository: Path) -> None:
    publish_toy(repository)
    path = repository / "doubling_onnx" / "config.pbtxt"
    path.write_text("# as version 0.1 wrote it\n" + path.read_text().replace("dims: [-1, 3]", "dims: -1 dims: 3"))
    before = path.read_text()
    publish_toy(repository, key="other")
    assert path.read_text() == before
    path.write_text(before.replace("dims: -1 dims: 3", "dims: -1 dims: 4"))
    publish_toy(repository, key="third")
    assert "dims: [-1, 3]" in path.read_text()


def test_an_artifact_that_is_not_served_is_found_but_not_in_the_repository(repository: Path) -> None:
    publish_toy(repository)
    kept = publish_toy(repository, served=False, target="torch", runtime="torch")
    assert newest(repository, "doubling_torch") == kept
    assert not kept.is_relative_to(repository)
    assert [path.name for path in repository.iterdir()] == ["doubling_onnx"]
    assert [Artifact.load(folder).name for folder in published(repository)] == ["doubling_onnx", "doubling_torch"]


def test_the_newest_version_is_found_wherever_it_is(repository: Path) -> None:
    assert publish_toy(repository, served=False).name == "1"
    served = publish_toy(repository)
    assert (served.name, newest(repository, "doubling_onnx")) == ("2", served)
    kept = publish_toy(repository, served=False)
    assert (kept.name, newest(repository, "doubling_onnx")) == ("3", kept)
    assert served.exists()


def test_nothing_published_is_found_in_an_empty_place(repository: Path) -> None:
    assert (newest(repository, "doubling_onnx"), published(repository)) == (None, [])


def test_steps_are_not_taken_for_artifacts(repository: Path) -> None:
    publish_all(repository)
    assert [folder.parent.name for folder in published(repository)] == ["running_onnx"]


def test_a_draft_that_differs_from_its_manifest_is_refused(repository: Path) -> None:
    with drafting(repository) as draft:
        artifact = toys.make(draft, toys.DOUBLING)
        (draft / "model.onnx").write_bytes(b"changed")
        with pytest.raises(ArtifactError, match="expected sha256"):
            publish(draft, artifact, repository)
    assert not repository.exists()


@pytest.mark.parametrize("earlier", [0, 1])
@pytest.mark.parametrize("refused", ["fsync", "rename", "write_text"])
def test_a_full_disk_leaves_the_repository_as_it_was(
    repository: Path, monkeypatch: pytest.MonkeyPatch, earlier: int, refused: str
) -> None:
    repository.mkdir()
    for _ in range(earlier):
        publish_toy(repository)
        (repository / "doubling_onnx" / "config.pbtxt").write_text("# another config")
    before = snapshot(repository)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with drafting(repository) as draft:
        artifact = toys.make(draft, toys.DOUBLING)
        monkeypatch.setattr(os if refused == "fsync" else Path, refused, full)
        with pytest.raises(ArtifactError, match=r"^expected to publish doubling_onnx .*No space left on device.*$"):
            publish(draft, artifact, repository)
        monkeypatch.undo()
    assert snapshot(repository) == before
    assert publish_toy(repository).name == str(earlier + 1)


def test_publishers_at_the_same_time_make_two_versions(repository: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda key: publish_toy(repository, key=key), "abcd"))
    assert sorted(path.name for path in made) == ["1", "2", "3", "4"]
    assert sorted(path.name for path in (repository / "doubling_onnx").iterdir()) == ["2", "3", "4", "config.pbtxt"]
    assert lint(repository) == []


KILLED = """
import os, sys, pathlib
sys.path[:0] = [{root!r}]
from tests import toys
from export.triton import repository
def die(path):
    os.kill(os.getpid(), 9)
repository.durable.sync = die
place = pathlib.Path({place!r})
with repository.drafting(place) as draft:
    repository.publish(draft, toys.make(draft, toys.DOUBLING), place)
"""


def test_the_next_publisher_removes_what_a_killed_one_left(repository: Path) -> None:
    program = KILLED.format(root=str(ROOT), place=str(repository))
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert list(repository.iterdir()) == []
    publish_toy(repository)
    aside = repository.with_name(".model_repository")
    assert [path for path in aside.rglob("*") if path.name != "drafts"] == []


def test_an_unchanged_ensemble_is_not_written_again(repository: Path) -> None:
    publish_all(repository)
    before = snapshot(repository)
    assert {"running/1", "running_encode/1/model.py", "running_decode/1/assets/unit.json"} <= before.keys()
    assert "running_encode/1/model.onnx" not in before  # a step needs what the pipeline reads, not the weights
    publish_ensemble(Artifact.load(repository / "running_onnx" / "1"), repository)
    assert snapshot(repository) == before


def test_the_ensemble_holds_the_schema_of_a_request(repository: Path) -> None:
    publish_all(repository)
    version = repository / "running" / "1"
    assert [path.name for path in version.iterdir()] == ["request.schema.json"]
    assert json.loads((version / "request.schema.json").read_text()) == {"type": "object"}


def test_the_steps_follow_a_new_artifact(repository: Path) -> None:
    publish_all(repository)
    publish_all(repository, key="other")
    assert Artifact.load(repository / "running_encode" / "2").key == "other"
    assert (repository / "running" / "1").exists()
    assert not (repository / "running" / "2").exists()


def test_every_config_follows_a_new_signature(repository: Path) -> None:
    publish_all(repository, toys.DOUBLING)
    smaller = (Axis(name="batch", min=1, opt=2, max=4), toys.AXES[1])
    publish_all(repository, Signature(inputs=(toys.X,), outputs=(toys.Y, toys.TOTAL), axes=smaller), key="smaller")
    assert lint(repository) == []
    assert all("max_batch_size: 4" in path.read_text() for path in repository.glob("*/config.pbtxt"))


def test_an_ensemble_needs_a_served_artifact(repository: Path, tmp_path: Path) -> None:
    artifact = toys.make(tmp_path / "made", toys.DOUBLING)
    with pytest.raises(ArtifactError, match="found no version of it; publish it first"):
        publish_ensemble(artifact, repository)


@pytest.mark.parametrize("signature", [toys.RUNNING, toys.DOUBLING], ids=["recurrent", "stateless"])
def test_a_published_repository_has_no_faults(repository: Path, signature: Signature) -> None:
    publish_all(repository, signature)
    assert lint(repository) == []


def test_the_ensemble_goes_through_onnx_whatever_is_exported_last(repository: Path) -> None:
    def lead(**changes: object) -> bool:
        return is_ensemble_target(Artifact.load(publish_toy(repository, **changes)), repository)

    assert lead(target="openvino"), "the only one there is"
    assert lead(target="onnx")
    assert not lead(target="openvino"), "exported again, after onnx"
    assert not lead(target="onnx", precision="int8"), "only the first precision of a target is led through"
    assert lead(target="openvino", checkpoint="newer"), "onnx of an older checkpoint is out of date"
    assert lead(target="onnx", checkpoint="newer")


def test_a_damaged_artifact_blocks_no_ensemble(repository: Path) -> None:
    for damaged in (publish_toy(repository, model="other"), publish_toy(repository, target="openvino")):
        write_manifest(damaged / "artifact.json", FORMAT, {"model": "of an earlier version"})
    assert is_ensemble_target(Artifact.load(publish_toy(repository, target="tensorrt")), repository)


def edit(file: str, old: str, new: str) -> Callable[[Path], None]:
    def plant(repository: Path) -> None:
        path = repository / file
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return plant


def remove(file: str) -> Callable[[Path], None]:
    return lambda repository: (repository / file).unlink()


def flip_a_byte(repository: Path) -> None:
    path = repository / "running_onnx" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")


def another_key(repository: Path) -> None:
    folder = repository / "running_onnx" / "1"
    replace(Artifact.load(folder), key="another").save(folder)


def another_pipeline(repository: Path) -> None:
    folder = repository / "running_decode" / "1"
    replace(Artifact.load(folder), pipeline="toi").save(folder)


def empty_ensemble(repository: Path) -> None:
    path = repository / "running" / "config.pbtxt"
    path.write_text(path.read_text().partition("ensemble_scheduling")[0])


ONNX, ENSEMBLE, ENCODE = "running_onnx/config.pbtxt", "running/config.pbtxt", "running_encode/config.pbtxt"
SCHEMA = "running/1/request.schema.json"
PLANTED: dict[str, tuple[Callable[[Path], None], str]] = {
    "name": (edit(ONNX, '"running_onnx"', '"runing"'), "running_onnx: expected the name of its folder, found 'runing'"),
    "dtype": (edit(ONNX, "TYPE_FP32", "TYPE_FP64"), "input 'x': expected TYPE_FP32 (-1, 3), found TYPE_FP64 (-1, 3)"),
    "dims": (edit(ONNX, "[-1, 3]", "[-1, 4]"), "input 'x': expected TYPE_FP32 (-1, 3), found TYPE_FP32 (-1, 4)"),
    "output": (edit(ONNX, 'name: "y"', 'name: "z"'), "output 'y': expected TYPE_FP32 (-1, 3), found nothing"),
    "batch": (edit(ONNX, "max_batch_size: 8", "max_batch_size: 9"), "expected max_batch_size 8, for which"),
    "state": (edit(ONNX, '"h_next"', '"h"'), "state 'h': expected h_next TYPE_FP32 (3,), found h TYPE_FP32 (3,)"),
    "zero": (edit(ONNX, "zero_data: true", 'data_file: "h"'), "state 'h': expected zeros as its initial state"),
    "backend": (edit(ONNX, '"onnxruntime"', '"openvino"'), "expected backend 'onnxruntime', found 'openvino'"),
    "file": (edit(ONNX, '"onnxruntime"', '"openvino"'), "expected model.xml in its manifest, found none"),
    "field": (
        edit(ONNX, "dims", "dimms"),
        ' : Message type "inference.ModelInput" has no field named "dimms"',
    ),
    "no config": (remove(ONNX), "running_onnx: expected config.pbtxt, found none"),
    "no manifest": (remove("running_onnx/1/artifact.json"), "artifact.json: expected this file, found none"),
    "missing": (remove("running_onnx/1/model.onnx"), "model.onnx: expected this file, found none"),
    "changed": (flip_a_byte, "model.onnx: expected sha256"),
    "no version": (
        lambda repository: shutil.rmtree(repository / "running" / "1"),
        "running: expected a version folder",
    ),
    "step": (edit(ENCODE, '"encode"', '"encde"'), "expected parameter step of encode, decode, write, found 'encde'"),
    "program": (remove("running_encode/1/model.py"), "running_encode: version 1: expected model.py, found none"),
    "asset": (remove("running_decode/1/assets/unit.json"), "unit.json: expected this file, found none"),
    "pipeline": (another_pipeline, "found 'toi'"),
    "old steps": (another_key, "expected steps made for one artifact, found 2 keys; publish the ensemble again"),
    "map": (edit(ENSEMBLE, 'value: "y"', 'value: "why"'), "step 'running_decode': input 'y': expected TYPE_FP32"),
    "key": (edit(ENSEMBLE, 'key: "y"', 'key: "why"'), "step 'running_onnx': expected outputs y, found 'why'"),
    "model": (
        edit(ENSEMBLE, "running_onnx", "running_plan"),
        "step 'running_plan': expected a model in the repository",
    ),
    "answer": (
        edit(ENSEMBLE, 'value: "answer"', 'value: "anser"'),
        "output 'answer': expected TYPE_STRING (1,), found",
    ),
    "no steps": (empty_ensemble, "running: output 'answer': expected TYPE_STRING (1,), found nothing"),
    "no schema": (remove(SCHEMA), "running: version 1: expected the schema of its requests, found"),
    "another schema": (edit(SCHEMA, "object", "array"), "expected the schema of its requests, found another; publish"),
    "version": (
        edit(ENSEMBLE, "model_version: 1", "model_version: 2"),
        "step 'running_encode': expected version 1, the newest, found 2; publish the ensemble again",
    ),
    "larger": (edit(ENSEMBLE, "size: 8", "size: 16"), "step 'running_onnx': expected max_batch_size 16, found 8"),
}


@pytest.mark.parametrize(("plant", "expected"), PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_found(repository: Path, plant: Callable[[Path], None], expected: str) -> None:
    publish_all(repository)
    plant(repository)
    assert any(expected in line for line in lint(repository)), lint(repository)
    assert all("\n" not in line for line in lint(repository))


def test_another_scheduling_changes_configs_and_no_version(repository: Path) -> None:
    publish_all(repository, toys.DOUBLING)
    artifact = Artifact.load(repository / "doubling_onnx" / "1")
    before = snapshot(repository)
    reschedule(artifact, repository, Scheduling())
    assert snapshot(repository) == before
    reschedule(artifact, repository, Scheduling(instances=2, queue=9))
    changed = {path for path, stat in snapshot(repository).items() if before[path] != stat}
    assert changed == {f"doubling_{name}/config.pbtxt" for name in ("onnx", "encode", "decode")}
    assert all("max_queue_size: 9" in (repository / path).read_text() for path in changed)
    assert lint(repository) == []


def test_an_ensemble_of_an_older_program_is_made_anew_when_its_artifact_is_reused(repository: Path) -> None:
    publish_all(repository)
    (repository / "running" / "1" / "request.schema.json").unlink()
    (repository / "running_encode" / "1" / "model.py").write_text("an older one")
    reschedule(Artifact.load(repository / "running_onnx" / "1"), repository, Scheduling())
    assert lint(repository) == []
    assert "class TritonPythonModel" in (repository / "running_encode" / "2" / "model.py").read_text()
    assert not (repository / "running_onnx" / "2").exists()


def test_an_ensemble_that_an_interrupted_export_left_behind_is_made_anew(repository: Path) -> None:
    publish_all(repository)
    artifact = Artifact.load(publish_toy(repository, toys.RUNNING, key="newer"))
    assert lint(repository) != []
    reschedule(artifact, repository, Scheduling())
    assert lint(repository) == []


def test_the_steps_of_another_artifact_keep_their_scheduling(repository: Path) -> None:
    publish_all(repository, toys.DOUBLING)
    aside = publish_toy(repository, target="openvino", key="other")
    before = snapshot(repository)
    reschedule(Artifact.load(aside), repository, Scheduling(instances=2, queue=9))
    changed = {path for path, stat in snapshot(repository).items() if before[path] != stat}
    assert changed == {"doubling_openvino/config.pbtxt"}
