"""A manifest is read as it was written, and a folder that does not match it is refused."""

import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtimes import artifact as module
from runtimes.artifact import (
    FORMAT,
    MANIFEST,
    Artifact,
    Check,
    Facts,
    artifact_name,
    digests,
    read_manifest,
    sha256_file,
    sha256_json,
    write_json,
    write_manifest,
)
from runtimes.errors import ArtifactError, InputError, SlipwayError
from runtimes.tensors import Axis, Signature, TensorSpec

RAN = Facts(built=True, deserialized=True, ran=True, compared=True)
GOOD = {"difference": Check(value=0.2, limit=1.0), "same": Check(value=1.0, limit=1.0, at_least=True)}


def make(folder: Path, **changes: Any) -> Artifact:
    """An artifact of two files, one of them in a folder below, saved in `folder`."""
    (folder / "assets").mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(bytes(range(256)))
    (folder / "assets" / "words.txt").write_text("größer\n", encoding="utf-8")
    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 3)),),
        outputs=(TensorSpec(name="y", dtype="float16", shape=("batch",)),),
        axes=(Axis(name="batch", min=1, opt=2, max=4),),
    )
    described: dict[str, Any] = {
        "model": "toy",
        "target": "onnx",
        "runtime": "onnxruntime",
        "precision": "fp32",
        "pipeline": "toy",
        "config": {"hidden": 3, "names": ["ä", "b"], "rate": 0.1},
        "signature": signature,
        "files": digests(folder),
        "built_with": {"torch": "2.13"},
        "checkpoint": "c" * 64,
        "key": "k" * 64,
        "facts": RAN,
        "parity": GOOD,
        "note": "",
    }
    artifact = Artifact(**{**described, **changes})
    artifact.save(folder)
    return artifact


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    saved = make(tmp_path)
    loaded = Artifact.load(tmp_path)
    assert loaded == saved
    loaded.verify_files(tmp_path)
    assert sorted(loaded.files) == ["assets/words.txt", "model.bin"]


def test_the_digests_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert digests(tmp_path) == {"empty": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}


def test_an_old_python_computes_the_same_digest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 5000)  # more than one block
    with path.open("rb") as stream:
        assert module._sha256(stream) == sha256_file(path)


@pytest.mark.parametrize("name", ["model.bin", "assets/words.txt"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_changed_byte_is_noticed(tmp_path: Path, name: str, place: int) -> None:
    artifact = make(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[place] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name}: expected sha256 .*, found .*; make it again"):
        artifact.verify_files(tmp_path)


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"model\.bin: expected sha256"):
        artifact.verify_files(tmp_path)


def test_a_missing_file_is_noticed(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"model\.bin: expected this file, found none"):
        artifact.verify_files(tmp_path)


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"artifact\.json: expected this file, found none"):
        Artifact.load(tmp_path)


@pytest.mark.parametrize("found", [{"format": "slipway.artifact/0"}, {}, {"format": None}, [], "slipway.artifact/1", 1])
def test_a_foreign_format_is_refused(tmp_path: Path, found: Any) -> None:
    write_json(tmp_path / MANIFEST, found)
    with pytest.raises(ArtifactError, match=r"expected format slipway\.artifact/1; export the model again"):
        Artifact.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b"PK\x03\x04"])
def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(InputError, match=r"artifact\.json: expected JSON in UTF-8"):
        Artifact.load(tmp_path)


@pytest.mark.parametrize("name", sorted(Artifact.__dataclass_fields__))
def test_a_manifest_without_one_of_its_fields_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    data = read_manifest(tmp_path / MANIFEST, FORMAT, "")
    del data[name]
    write_manifest(tmp_path / MANIFEST, FORMAT, data)
    if name == "note":
        assert Artifact.load(tmp_path).note == ""
    else:
        with pytest.raises(ArtifactError, match=r"artifact\.json: expected a manifest"):
            Artifact.load(tmp_path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_byte_of_a_manifest_is_noticed_or_means_the_same(tmp_path: Path, data: st.DataObject) -> None:
    saved = make(tmp_path)
    content = bytearray((tmp_path / MANIFEST).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    (tmp_path / MANIFEST).write_bytes(content)
    with contextlib.suppress(SlipwayError):
        assert Artifact.load(tmp_path) == saved


def test_a_write_that_fails_leaves_the_old_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        replace(saved, key="another").save(tmp_path)
    assert Artifact.load(tmp_path) == saved


def test_every_check_must_pass_to_be_a_proof(tmp_path: Path) -> None:
    assert make(tmp_path).verified
    assert not make(tmp_path, parity={**GOOD, "more": Check(value=1.1, limit=1.0)}).verified
    assert not make(tmp_path, parity={**GOOD, "same": Check(value=0.999, limit=1.0, at_least=True)}).verified


def test_nothing_compared_is_not_a_proof(tmp_path: Path) -> None:
    assert not make(tmp_path, parity={}).verified
    assert not make(tmp_path, facts=replace(RAN, compared=False)).verified


@pytest.mark.parametrize("at_least", [False, True])
def test_nan_is_not_a_proof_also_after_it_was_saved(tmp_path: Path, at_least: bool) -> None:
    check = Check(value=math.nan, limit=1.0, at_least=at_least)
    assert not check.passed
    make(tmp_path, parity={**GOOD, "nan": check})
    loaded = Artifact.load(tmp_path)
    assert math.isnan(loaded.parity["nan"].value)
    assert not loaded.verified
    assert not Check(value=0.0, limit=math.nan, at_least=at_least).passed


def test_a_limit_is_met_by_what_equals_it() -> None:
    assert Check(value=1.0, limit=1.0).passed
    assert Check(value=1.0, limit=1.0, at_least=True).passed
    assert not Check(value=math.inf, limit=1.0).passed


def test_the_name_tells_the_precision_only_where_it_is_not_fp32() -> None:
    assert artifact_name("toy", "onnx", "fp32") == "toy_onnx"
    assert artifact_name("toy", "onnx", "fp16") == "toy_onnx_fp16"


def test_a_json_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert sha256_json({"a": 1, "b": [1, 2]}) == sha256_json({"b": [1, 2], "a": 1})
    assert sha256_json({"a": 1, "b": [1, 2]}) != sha256_json({"a": 1, "b": [2, 1]})
    assert sha256_json({}) == sha256_json(json.loads("{ }"))


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/a", "a b", "-a", "a\n", "a\0", "é", "%2e%2e"])
def test_no_name_leads_out_of_the_repository(name: str, tmp_path: Path) -> None:
    for parts in ((name, "onnx", "fp32"), ("toy", name, "fp32"), ("toy", "onnx", name)):
        with pytest.raises(InputError, match="expected a name of letters"):
            artifact_name(*parts)
    with pytest.raises(InputError, match="expected a name of letters"):
        make(tmp_path, model=name)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "assets/../../x"])
def test_a_manifest_that_lists_files_elsewhere_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected files inside the artifact's folder, found"):
        make(tmp_path, files={file: "0" * 64})
