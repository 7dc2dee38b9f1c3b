"""The Triton model repository: publishes artifacts so that a reader sees complete models only, at any time.

Work in progress lies in the workspace next to the repository (see runtimes.repository), in `drafts/` and `staging/`.
The two must be on one file system: a version appears by one rename.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import runtimes.triton
from export.triton.backend import find_backend
from export.triton.config import (
    STEPS,
    VERSIONS_LOADED,
    ensemble_config,
    model_config,
    step_config,
    step_name,
    writer_config,
)
from export.triton.scheduling import UNLIMITED, Scheduling
from export.triton.schema import CONFIG, ModelConfig, has_config, to_text
from runtimes.artifact import MANIFEST, Artifact, read_json, sha256_file, verify_digests, write_json
from runtimes.errors import ArtifactError, SlipwayError, one_line
from runtimes.host import durable
from runtimes.pipeline import open_pipeline
from runtimes.repository import (
    REQUEST_SCHEMA,
    STEP_FILE,
    all_versions,
    artifacts_root,
    holds_artifact,
    number_of,
    versions,
    workspace,
)
from runtimes.text_pipeline import BatchingPipeline

STEP_SOURCES = Path(runtimes.triton.__file__).parent / "steps"
VERSIONS_KEPT = VERSIONS_LOADED + 1  # Triton 2.51 stops loading models once a version vanishes while it is loaded
# Triton's interpreter ignores PYTHONDONTWRITEBYTECODE, and a server that polls would load each step twice.
NO_BYTECODE = "This file takes the place of a folder: Triton would take bytecode in it for a change of the model.\n"


def publish(
    draft: Path,
    artifact: Artifact,
    repository: Path,
    *,
    served: bool = True,
    scheduling: Scheduling = UNLIMITED,
    mounted_at: Path | None = None,
) -> Path:
    """The new version folder of `artifact`, to which `draft` was moved; the three newest versions are kept.

    `served=False` puts it in the folder that Triton does not read. `mounted_at` is the repository's path on the server,
    if that is another. `ArtifactError` if the draft differs from its manifest, or if the disk refuses a write; the
    repository is then unchanged.
    """
    artifact.verify_files(draft)
    with _publishing(artifact.name, repository) as staging:
        model = artifacts_root(repository, served) / artifact.name
        loaded = how_many_load(artifact, versions(model))
        config = model_config(artifact, artifact.runtime, scheduling, loaded) if served else None
        number = max(map(number_of, all_versions(repository, artifact.name)), default=0) + 1
        address(draft, artifact, server_paths(artifact, repository if mounted_at is None else mounted_at, number))
        published = _install(draft, model, number, config, staging)
        _discard(versions(model)[:-VERSIONS_KEPT], staging)
        if served:  # an unserved version of before is out of date
            _discard(versions(artifacts_root(repository, False) / artifact.name), staging)
        return published


def publish_again(found: Path, artifact: Artifact, repository: Path, *, mounted_at: Path | None = None) -> Path:
    """`found`, or a new version with the same files and other paths, where its server needs other ones."""
    where = repository if mounted_at is None else mounted_at
    if found.parent.parent.absolute() != repository.absolute() or is_addressed(found, artifact, where):
        return found
    with drafting(repository) as draft:
        shutil.copytree(found, draft, copy_function=os.link, dirs_exist_ok=True)
        return publish(draft, artifact, repository, mounted_at=mounted_at)


def server_paths(artifact: Artifact, repository: Path, number: int) -> Mapping[str, str]:
    """The absolute paths in the files of version `number`, by key, for a server that has the repository there."""
    backend = find_backend(artifact.runtime)
    return backend.server_paths(repository.absolute() / artifact.name / str(number)) if backend else {}


def is_addressed(version: Path, artifact: Artifact, repository: Path) -> bool:
    """Whether the paths in a version's files are right for a server that has the repository there."""
    paths = server_paths(artifact, repository, number_of(version))
    return not paths or paths.items() <= read_json(version / _path_file(artifact)).items()


def address(draft: Path, artifact: Artifact, paths: Mapping[str, str]) -> None:
    """The draft's files and its manifest have these paths; without paths nothing changes."""
    if not paths:
        return
    name = _path_file(artifact)
    settings = read_json(draft / name)
    (draft / name).unlink()  # it may be a link to that of another version
    write_json(draft / name, {**settings, **paths})
    replace(artifact, files={**artifact.files, name: sha256_file(draft / name)}).save(draft)


def _path_file(artifact: Artifact) -> str:
    """The JSON file in which the backend of an artifact reads absolute paths."""
    backend = find_backend(artifact.runtime)
    assert backend, "only a backend has paths"
    return backend.file


def reschedule(artifact: Artifact, repository: Path, scheduling: Scheduling) -> None:
    """The config of the published artifact has this scheduling, and its ensemble is up to date.

    Files that have not changed are not touched.
    """
    model = repository / artifact.name
    if not versions(model):
        return
    with _publishing(artifact.name, repository) as staging:
        loaded = how_many_load(artifact, versions(model)[:-1])
        config = model_config(artifact, artifact.runtime, scheduling, loaded)
        with _config_replaced(model, config, staging):
            durable.sync(model)
    steps = versions(repository / step_name(artifact.model, STEPS[0]))
    if steps and Artifact.load(steps[-1]).name == artifact.name:
        publish_ensemble(artifact, repository, scheduling)


def publish_ensemble(artifact: Artifact, repository: Path, scheduling: Scheduling = UNLIMITED) -> None:
    """The ensemble named after the model goes through `artifact`; files that have not changed are not written again.

    It names the versions of its steps and is written after them. Triton polls models in the order of their names, hence
    the ensemble before its steps: when the new ensemble is there, its steps are, and until then the old one finds its
    own. A pipeline that generates in batches has a model of its own beside the ensemble. Both hold the JSON Schema of a
    request. `ArtifactError` if the artifact is not served.
    """
    served = versions(repository / artifact.name)
    if not served:
        raise ArtifactError(f"expected {artifact.name} in {repository}, found no version of it; publish it first")
    assets = Artifact.load(served[-1]).assets
    with _publishing(artifact.model, repository) as staging:
        numbers = {artifact.name: number_of(served[-1])}
        for step in STEPS:
            draft = _draft_step(served[-1], staging / step, STEP_FILE, assets)
            model = repository / step_name(artifact.model, step)
            loaded = how_many_load(artifact, earlier_than(draft, model))
            _install_changes(draft, model, step_config(artifact, step, scheduling, loaded), staging)
            numbers[model.name] = number_of(versions(model)[-1])
        draft = staging / "ensemble"
        draft.mkdir()
        pipeline = open_pipeline(artifact, served[-1])
        write_json(draft / REQUEST_SCHEMA, pipeline.schema())
        _install_changes(draft, repository / artifact.model, ensemble_config(artifact, numbers), staging)
        if isinstance(pipeline, BatchingPipeline):
            name = pipeline.served_name(artifact.model)
            draft = _draft_step(served[-1], staging / "writer", "write.py", artifact.files)
            write_json(draft / REQUEST_SCHEMA, pipeline.generation_schema)
            _install_changes(draft, repository / name, writer_config(artifact, name, scheduling), staging)


def how_many_load(artifact: Artifact, earlier: list[Path]) -> int:
    """How many of the newest versions a server loads of a model to which `artifact` was added, or will be.

    One, if the last of the `earlier` ones needs another config or other libraries: Triton loads all or none.
    """
    if not earlier:
        return VERSIONS_LOADED
    try:
        last = Artifact.load(earlier[-1])
        verify_digests(earlier[-1], last.files if holds_artifact(earlier[-1]) else last.assets)
    except SlipwayError:  # damaged, or of an older format
        return 1
    alike = (last.signature, last.built_with) == (artifact.signature, artifact.built_with)
    return VERSIONS_LOADED if alike else 1


def earlier_than(draft: Path, model: Path) -> list[Path]:
    """The versions of a model but the one that holds, or will hold, the files of `draft`."""
    present = versions(model)
    return present[:-1] if present and _contents(present[-1]) == _contents(draft) else present


@contextmanager
def drafting(repository: Path) -> Iterator[Path]:
    """A new folder for the files of an artifact, which `publish` can move; it is removed at the end."""
    drafts = workspace(repository) / "drafts"
    drafts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(drafts):  # no other process sweeps the draft before it is locked
            _sweep(drafts)
            own = Path(tempfile.mkdtemp(dir=drafts))
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            stack.enter_context(_locked(own))
        draft = own / "draft"
        draft.mkdir()
        yield draft


@contextmanager
def _publishing(name: str, repository: Path) -> Iterator[Path]:
    """An empty folder for staging, while no other process publishes; `ArtifactError` if the disk refuses a write."""
    staging = workspace(repository) / "staging"
    try:
        repository.mkdir(parents=True, exist_ok=True)
        staging.parent.mkdir(exist_ok=True)
        with _locked(staging.parent):
            shutil.rmtree(staging, ignore_errors=True)  # left by a publisher that was killed
            staging.mkdir()
            try:
                yield staging
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"expected to publish {name} in {repository}, found {one_line(error)}; it is as it was, publish again"
        ) from error


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """No other process holds `folder`; `BlockingIOError` if one does, without `wait`. A killed process unlocks it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _sweep(drafts: Path) -> None:
    """Remove the drafts of processes that were killed: no process holds them. Another may remove its own meanwhile."""
    for draft in drafts.iterdir():
        with suppress(BlockingIOError, FileNotFoundError), _locked(draft, wait=False):
            shutil.rmtree(draft, ignore_errors=True)


def _install(draft: Path, model: Path, number: int, config: ModelConfig | None, staging: Path) -> Path:
    """The version folder `number` of `model`, renamed into place when everything in it is on the disk."""
    version = model / str(number)
    if model.is_dir():
        durable.sync_tree(draft)
        with _config_replaced(model, config, staging):
            draft.rename(version)
    else:
        whole = staging / f"{model.name}.whole"
        whole.mkdir()
        if config is not None:
            (whole / CONFIG).write_text(to_text(config))
        draft.rename(whole / version.name)
        durable.sync_tree(whole)
        model.parent.mkdir(parents=True, exist_ok=True)
        whole.rename(model)
    durable.sync(model)
    durable.sync(model.parent)
    return version


def _install_changes(draft: Path, model: Path, config: ModelConfig, staging: Path) -> None:
    """`model` has this config and, as its newest version, these files; it is not touched if it has them already."""
    present = versions(model)
    if present != earlier_than(draft, model):
        with _config_replaced(model, config, staging):
            return
    number = number_of(present[-1]) + 1 if present else 1
    _install(draft, model, number, config, staging)
    _discard(versions(model)[:-VERSIONS_KEPT], staging)


@contextmanager
def _config_replaced(model: Path, config: ModelConfig | None, staging: Path) -> Iterator[None]:
    """`model` has this config, untouched if it is equal, and the old one again if the disk refuses a later write."""
    path, new, old = model / CONFIG, staging / f"{model.name}.new", staging / f"{model.name}.old"
    if config is None or has_config(model, config):
        yield
        return
    new.write_text(to_text(config))
    durable.sync(new)
    if path.is_file():
        old.hardlink_to(path)
    new.replace(path)
    try:
        yield
    except OSError:
        if old.exists():
            old.replace(path)
        raise


def _draft_step(version: Path, draft: Path, program: str, files: Iterable[str]) -> Path:
    """`draft` holds the parts of an artifact that a Python model needs: manifest, these files, and the program."""
    for name in (MANIFEST, *files):
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(version / name, draft / name)
    shutil.copyfile(STEP_SOURCES / program, draft / STEP_FILE)
    (draft / "__pycache__").write_text(NO_BYTECODE)
    return draft


def _contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def _discard(folders: list[Path], staging: Path) -> None:
    """Remove folders; each leaves the repository by one rename before its files are deleted."""
    for folder in folders:
        folder.rename(staging / f"{folder.parent.name}-{folder.name}")
