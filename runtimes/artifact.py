"""Artifact: the manifest of a converted model. It records the model, its origin, and its checks."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from runtimes.errors import ArtifactError, InputError, one_line
from runtimes.tensors import Signature

MANIFEST = "artifact.json"
ASSETS = "assets"  # files of a pipeline, such as a tokenizer
FORMAT = "slipway.artifact/1"
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a model, target, precision: each becomes part of a path


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One measured fact of parity and the limit it had to meet."""

    value: float
    limit: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """False for NaN: neither comparison holds."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """The steps that were done with an artifact on the machine that made it."""

    built: bool
    deserialized: bool
    ran: bool
    compared: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Artifact:
    """A converted model in one folder: this manifest beside the files it lists.

    `key` names everything the bytes depend on; `checkpoint` is the digest of the checkpoint that was converted;
    `note` is the reason why the artifact was not run where it was made, if it was not.
    """

    model: str
    target: str
    runtime: str
    precision: str
    pipeline: str
    config: Mapping[str, Any]
    signature: Signature
    files: Mapping[str, str]
    built_with: Mapping[str, str]
    checkpoint: str
    key: str
    facts: Facts
    parity: Mapping[str, Check] = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        for name in (self.model, self.target, self.runtime, self.precision, self.pipeline):
            require_plain(name)
        for file in self.files:
            if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
                raise ArtifactError(f"{self.model}: expected files inside the artifact's folder, found '{file}'")

    @property
    def assets(self) -> dict[str, str]:
        """The files that the pipeline may read, without the weights; a step of an ensemble needs these."""
        return {name: digest for name, digest in self.files.items() if name.startswith(f"{ASSETS}/")}

    @property
    def verified(self) -> bool:
        """True when the artifact was compared with the original and every check passed."""
        return self.facts.compared and bool(self.parity) and all(check.passed for check in self.parity.values())

    @property
    def name(self) -> str:
        """The folder name: model_target, with the precision behind it when it is not fp32."""
        return artifact_name(self.model, self.target, self.precision)

    def save(self, folder: Path) -> None:
        data = {slot: getattr(self, slot) for slot in self.__dataclass_fields__}
        data |= {
            "signature": self.signature.to_json(),
            "facts": {name: getattr(self.facts, name) for name in Facts.__dataclass_fields__},
            "parity": {
                name: {"value": check.value, "limit": check.limit, "at_least": check.at_least}
                for name, check in self.parity.items()
            },
        }
        write_manifest(folder / MANIFEST, FORMAT, data)

    @classmethod
    def load(cls, folder: Path) -> "Artifact":
        """The manifest in `folder`; `InputError` if there is none, `ArtifactError` if it is not one."""
        path = folder / MANIFEST
        data = read_manifest(path, FORMAT, "export the model again")
        try:
            data["signature"] = Signature.from_json(data["signature"])
            data["facts"] = Facts(**data["facts"])
            data["parity"] = {name: Check(**check) for name, check in data["parity"].items()}
            return cls(**data)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise not_a_manifest(path, error, "export the model again") from error

    def verify_files(self, folder: Path) -> None:
        """`ArtifactError` unless every listed file is in `folder` with the digest listed."""
        verify_digests(folder, self.files)


def require_plain(name: str) -> None:
    """`InputError` for a name that could lead out of its folder."""
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise InputError(f"expected a name of letters, digits, '_', '-' and '.', found {ascii(name)[:80]}")


def artifact_name(model: str, target: str, precision: str) -> str:
    """The folder name of an artifact; `InputError` for a part that is no plain name."""
    for part in (model, target, precision):
        require_plain(part)
    return f"{model}_{target}" if precision == "fp32" else f"{model}_{target}_{precision}"


def sha256_file(path: Path) -> str:
    """Of the bytes in a file, in hex, read piece by piece."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(stream)


def _sha256(stream: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    for block in iter(lambda: stream.read(1 << 20), b""):
        digest.update(block)
    return digest.hexdigest()


def sha256_json(data: Any) -> str:
    """The digest of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file below `folder` by relative path, sorted; the manifest itself is left out."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}


def verify_digests(folder: Path, files: Mapping[str, str]) -> None:
    """`ArtifactError` unless every file of `files` is in `folder`, unchanged."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: expected this file, found none; make it again")
        found = sha256_file(path)
        if found != expected:
            raise ArtifactError(f"{path}: expected sha256 {expected[:12]}…, found {found[:12]}…; make it again")


def read_json(path: Path) -> Any:
    """The JSON value in a file; a one-line error if it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected this file, found none") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: expected JSON in UTF-8, found {error}") from error


def read_manifest(path: Path, format_: str, remedy: str) -> dict[str, Any]:
    """The fields of a manifest; `ArtifactError` if it has another format or was changed since it was written."""
    data = read_json(path)
    if not isinstance(data, dict) or data.pop("format", None) != format_:
        raise ArtifactError(f"{path}: expected format {format_}; {remedy}")
    expected, found = str(data.pop("sha256", None)), sha256_json(data)
    if expected != found:
        raise ArtifactError(f"{path}: expected sha256 {expected[:12]}…, found {found[:12]}…; {remedy}")
    return data


def write_manifest(path: Path, format_: str, fields: Mapping[str, Any]) -> None:
    """Write the fields with their format and their own sha256: a changed check or setting is noticed."""
    write_json(path, {"format": format_, **fields, "sha256": sha256_json(fields)})


def not_a_manifest(path: Path, error: Exception, remedy: str) -> ArtifactError:
    """The error for a manifest of the right format whose fields are missing, unknown or of another kind."""
    return ArtifactError(f"{path}: expected a manifest, found {type(error).__name__}: {one_line(error)}; {remedy}")


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one."""
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
