"""The places of artifacts in a Triton model repository, and how the newest is found; `export` publishes them.

    model_repository/NAME/{config.pbtxt, 1/, 2/}     served by Triton; entries that take JSON have its schema
    .model_repository/unserved/NAME/{1/, 2/}         artifacts that Triton cannot serve here

The second folder is next to the first and not inside it, because Triton takes every folder in a repository for a
model, also one whose name begins with a dot, and does not start when it is none.
"""

from pathlib import Path

from runtimes.artifact import MANIFEST, artifact_name
from runtimes.errors import InputError, nearest

STEP_FILE = "model.py"
REQUEST_SCHEMA = "request.schema.json"


def newest(repository: Path, name: str) -> Path | None:
    """The newest version folder of a published artifact, served or not."""
    return max(all_versions(repository, name), key=number_of, default=None)


def published(repository: Path) -> list[Path]:
    """The newest version folder of every published artifact, served or not, sorted by name."""
    homes = [home for home in (artifacts_root(repository, True), artifacts_root(repository, False)) if home.is_dir()]
    names = sorted({model.name for home in homes for model in home.iterdir()})
    folders = (newest(repository, name) for name in names)
    return [folder for folder in folders if folder and holds_artifact(folder)]


def find(repository: Path, name: str, *, remedy: str = "publish it: python -m export.all MODEL") -> Path:
    """The newest version folder of artifact `name`; `InputError` names the nearest one, and the remedy."""
    folder = newest(repository, name)
    if folder is None or not holds_artifact(folder):
        close = nearest(name, [path.parent.name for path in published(repository)])
        suggestion = f"did you mean '{close}'? " if close else ""
        raise InputError(f"expected an artifact '{name}' in {repository}, found none; {suggestion}{remedy}")
    return folder


def find_artifact(repository: Path, model: str, target: str = "onnx", precision: str = "fp32") -> Path:
    """The newest version folder of a model's artifact; `InputError` has the command that publishes a missing one."""
    command = f"python -m export.all {model} --target {target}"
    more = "" if precision == "fp32" else f" --precision {precision}"
    return find(repository, artifact_name(model, target, precision), remedy=f"publish it: {command}{more}")


def versions(model: Path) -> list[Path]:
    """The version folders of a model, oldest first."""
    if not model.is_dir():
        return []
    return sorted((folder for folder in model.iterdir() if folder.name.isdecimal()), key=number_of)


def all_versions(repository: Path, name: str) -> list[Path]:
    """The version folders of an artifact, served or not."""
    return [*versions(artifacts_root(repository, True) / name), *versions(artifacts_root(repository, False) / name)]


def number_of(version: Path) -> int:
    """The number of a version folder."""
    return int(version.name)


def holds_artifact(version: Path) -> bool:
    """False for the steps of an ensemble, which have the manifest of the artifact that they were made for."""
    return (version / MANIFEST).is_file() and not (version / STEP_FILE).is_file()


def artifacts_root(repository: Path, served: bool) -> Path:
    """The folder of the artifacts that are served, or of those that are not."""
    return repository if served else workspace(repository) / "unserved"


def workspace(repository: Path) -> Path:
    """The folder next to the repository, which Triton does not read."""
    repository = repository.absolute()
    return repository.with_name(f".{repository.name}")
