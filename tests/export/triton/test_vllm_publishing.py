"""An entry of Triton's vllm backend names its folders by their paths on the server, and the linter finds faults."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from export import verify
from export.triton.lint import lint
from export.triton.repository import publish, publish_again
from export.triton.schema import CONFIG
from runtimes.artifact import Artifact, Facts, digests, read_json, write_json
from runtimes.repository import versions
from runtimes.vllm.artifact import CHECKPOINT, ENGINE_FILE, TOKENIZER, engine_arguments
from training.models.hallucination.generator_spec import signature

NAME = "writer_vllm_w4a16_awq"


def artifact_in(folder: Path, task: str = "generate") -> Artifact:
    """A manifest over files of the right names; nothing here reads what is in them."""
    for name in (CHECKPOINT, TOKENIZER):
        (folder / name).mkdir(parents=True)
    (folder / CHECKPOINT / "config.json").write_text("{}")
    (folder / TOKENIZER / "tokenizer.json").write_text("{}")
    arguments: dict[str, Any] = {"model": CHECKPOINT, "tokenizer": TOKENIZER, "dtype": "bfloat16"}
    if task == "embed":
        (folder / CHECKPOINT / "1_Pooling").mkdir()
        for name in ("modules.json", "1_Pooling/config.json"):
            (folder / CHECKPOINT / name).write_text("{}")
        arguments["runner"] = "pooling"
    write_json(folder / ENGINE_FILE, arguments)
    artifact = Artifact(
        model="writer",
        target="vllm",
        runtime="vllm",
        precision="w4a16_awq",
        pipeline="hallucination_generator",
        config={},
        signature=signature({"max_tokens": 64, "max_batch": 2}),
        files=digests(folder),
        built_with={"task": task},
        checkpoint="",
        key="key",
        facts=Facts(built=True, deserialized=True, ran=True, compared=True),
    )
    artifact.save(folder)
    return artifact


@pytest.fixture(params=["generate", "embed"])
def repository(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    draft = tmp_path / "draft"
    publish(draft, artifact_in(draft, request.param), tmp_path / "repository")
    return tmp_path / "repository"


def newest(repository: Path) -> Path:
    return versions(repository / NAME)[-1]


def test_folders_have_whole_paths_and_digests_that_fit(repository: Path) -> None:
    version = newest(repository)
    arguments = read_json(version / ENGINE_FILE)
    assert arguments["model"] == str(version.absolute() / CHECKPOINT)
    assert arguments["tokenizer"] == str(version.absolute() / TOKENIZER)
    Artifact.load(version).verify_files(version)
    assert lint(repository) == []


def test_a_container_that_has_the_repository_elsewhere_gets_its_own_paths(repository: Path) -> None:
    version = newest(repository)
    first = publish_again(version, Artifact.load(version), repository, mounted_at=Path("/models"))
    assert first != version
    assert read_json(first / ENGINE_FILE)["model"] == f"/models/{NAME}/2/{CHECKPOINT}"
    assert read_json(version / ENGINE_FILE)["model"] == str(version / CHECKPOINT), "a served version never changes"
    assert engine_arguments(first)["model"] == str(first / CHECKPOINT), "here, the folder beside it is meant"
    assert publish_again(first, Artifact.load(first), repository, mounted_at=Path("/models")) == first
    assert lint(repository, Path("/models")) == []
    (problem, *_) = lint(repository)
    assert f"expected model '{first / CHECKPOINT}', found '/models/" in problem
    assert verify.main(["--repository", str(repository)]) == 1
    assert verify.main(["--repository", str(repository), "--mounted-at", "/models"]) == 0


def test_a_repository_that_was_moved_is_noticed(repository: Path, tmp_path: Path) -> None:
    moved = repository.rename(tmp_path / "moved")
    assert any("model.json: expected model" in problem for problem in lint(moved))
    version = newest(moved)
    publish_again(version, Artifact.load(version), moved)
    assert lint(moved) == []


def test_nothing_else_is_published_again(tmp_path: Path) -> None:
    draft = tmp_path / "draft"
    other = replace(artifact_in(draft), runtime="onnxruntime", target="onnx")
    other.save(draft)
    version = publish(draft, other, tmp_path / "repository")
    assert publish_again(version, other, tmp_path / "repository", mounted_at=Path("/models")) == version
    assert read_json(version / ENGINE_FILE)["model"] == CHECKPOINT


def in_config(old: str, new: str) -> Callable[[Path], None]:
    def change(repository: Path) -> None:
        path = repository / NAME / CONFIG
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def in_arguments(**changes: object) -> Callable[[Path], None]:
    """Change model.json and its digest: it was made so, not damaged."""

    def change(repository: Path) -> None:
        version = newest(repository)
        path = version / ENGINE_FILE
        path.write_text(json.dumps({**read_json(path), **changes}))
        replace(Artifact.load(version), files=digests(version)).save(version)

    return change


def without_task(repository: Path) -> None:
    version = newest(repository)
    replace(Artifact.load(version), built_with={}).save(version)


def without_tokenizer(repository: Path) -> None:
    version = newest(repository)
    (version / TOKENIZER / "tokenizer.json").unlink()
    replace(Artifact.load(version), files=digests(version)).save(version)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (in_config("decoupled: true", "decoupled: false"), "expected model_transaction_policy decoupled"),
        (in_config('backend: "vllm"', 'backend: "vllm" max_batch_size: 8'), "expected max_batch_size 0"),
        (in_config("KIND_MODEL", "KIND_CPU"), "expected one instance group of KIND_MODEL with count 1"),
        (in_config("count: 1", "count: 2"), "expected one instance group of KIND_MODEL with count 1"),
        (
            in_config('name: "stream"', 'name: "streams"'),
            "input 'stream': expected it as the vllm backend has it",
        ),
        (
            in_config("dims: [-1]", "dims: [4]"),
            "output 'text_output': expected it as the vllm backend",
        ),
        (in_config('backend: "vllm"', 'backend: "python"'), "expected parameter step"),
        (in_arguments(model="checkpoint"), "model.json: expected model '/"),
        (in_arguments(tokenizer="/elsewhere"), "model.json: expected tokenizer '/"),
        (in_arguments(runner="draft"), "model.json: expected "),
        (without_task, "expected a task of generate, embed, found None"),
        (without_tokenizer, "expected tokenizer/tokenizer.json in the manifest, found none"),
    ],
)
def test_the_linter_sees_it(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    draft, repository = tmp_path / "draft", tmp_path / "repository"
    publish(draft, artifact_in(draft, "embed"), repository)
    change(repository)
    assert any(message in problem for problem in lint(repository)), lint(repository)
