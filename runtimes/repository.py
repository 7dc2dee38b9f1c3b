"""Where artifacts lie in a Triton model repository, and how the newest is found. Who publishes is above: export.

    model_repository/NAME/{config.pbtxt, 1/, 2/}     what Triton serves; beside what takes JSON, the schema of a request
    .model_repository/unserved/NAME/{1/, 2/}         artifacts that are kept, but that no Triton here can serve

The second folder lies beside the first and not in it, because Triton takes every folder in a repository for a model,
also one whose name begins with a dot, and does not start when it is none.
"""

from pathlib import Path

from runtimes.artifact import MANIFEST, artifact_name
from runtimes.errors import InputError
from runtimes.host.cli import nearest

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
    """False for the steps of an ensemble, which have a manifest too: that of the artifact they were made for."""
    return (version / MANIFEST).is_file() and not (version / STEP_FILE).is_file()


def artifacts_root(repository: Path, served: bool) -> Path:
    """The folder that holds what is served, or what is not."""
    return repository if served else workspace(repository) / "unserved"


def workspace(repository: Path) -> Path:
    """The folder next to the repository that Triton does not look into."""
    repository = repository.absolute()
    return repository.with_name(f".{repository.name}")
