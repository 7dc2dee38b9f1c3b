"""The Triton model repository: publishes artifacts so that whoever looks at it, at any time, sees whole models only.

Work in progress lies in the folder beside the repository (see runtimes.repository), in `drafts/` and `staging/`. The
two must be on one file system: a version appears by one rename.
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
from runtimes.generation import BatchingPipeline
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

STEP_SOURCES = Path(runtimes.triton.__file__).parent / "steps"
VERSIONS_KEPT = VERSIONS_LOADED + 1  # Triton 2.51 loads nothing any more once a version vanishes that it is loading
# Triton's interpreter heeds no PYTHONDONTWRITEBYTECODE, and a server that polls would load each step twice.
NO_BYTECODE = "A file where Python wants a folder: what it wrote there, Triton would take for a change of the model.\n"


def publish(
    draft: Path,
    artifact: Artifact,
    repository: Path,
    *,
    served: bool = True,
    scheduling: Scheduling = UNLIMITED,
    mounted_at: Path | None = None,
) -> Path:
    """The new version folder of `artifact`, which `draft` has become; the three newest versions are kept.

    `served=False` keeps it where no Triton sees it. `mounted_at` is the repository's path for the server that reads it,
    where that is another. `ArtifactError` if the draft is not what its manifest says, or if the disk refuses; the
    repository is then as it was.
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
        if served:  # a version that was kept aside until now is out of date
            _discard(versions(artifacts_root(repository, False) / artifact.name), staging)
        return published


def publish_again(found: Path, artifact: Artifact, repository: Path, *, mounted_at: Path | None = None) -> Path:
    """`found`, or a new version with the same files if the paths in it are not those of its server."""
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
    """The published artifact's config says this scheduling, and the ensemble made for it is as it would be made now.

    What is so already is not touched.
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
    """The ensemble named after the model leads through `artifact`; what has not changed is not written again.

    It names the versions of its steps and is written after them. Triton looks at models by name, hence at the ensemble
    before its steps: where it sees the new one it sees what that names, and until then the old one finds what it names.
    Beside that of a step of a byte language model lies a model that writes texts with it. Both say in a file what a
    request must be. `ArtifactError` if the artifact is not served.
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
    """How many of the newest versions a server is to load of a model to which `artifact` was added, or will be.

    One where it could not load the last of the `earlier` ones, by the same config and with the same libraries: Triton
    loads all or none.
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
    """The versions of a model beside that which holds, or will hold, what `draft` does."""
    present = versions(model)
    return present[:-1] if present and _contents(present[-1]) == _contents(draft) else present


@contextmanager
def drafting(repository: Path) -> Iterator[Path]:
    """A new folder to make an artifact in, fit for `publish`; whatever is left of it at the end is removed."""
    drafts = workspace(repository) / "drafts"
    drafts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with _locked(drafts):  # nobody sweeps a draft between its making and its locking
            _sweep(drafts)
            own = Path(tempfile.mkdtemp(dir=drafts))
            stack.callback(shutil.rmtree, own, ignore_errors=True)
            stack.enter_context(_locked(own))
        draft = own / "draft"
        draft.mkdir()
        yield draft


@contextmanager
def _publishing(name: str, repository: Path) -> Iterator[Path]:
    """An empty folder for staging, with no other publisher at work; a refusal of the disk is an `ArtifactError`."""
    staging = workspace(repository) / "staging"
    try:
        repository.mkdir(parents=True, exist_ok=True)
        staging.parent.mkdir(exist_ok=True)
        with _locked(staging.parent):
            shutil.rmtree(staging, ignore_errors=True)  # what a publisher left that was killed
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
    """No other process holds `folder`; `BlockingIOError` if one does and we do not wait. A killed holder lets go."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


def _sweep(drafts: Path) -> None:
    """Remove the drafts whose makers were killed: nobody holds them. A maker may remove its own at the same time."""
    for draft in drafts.iterdir():
        with suppress(BlockingIOError, FileNotFoundError), _locked(draft, wait=False):
            shutil.rmtree(draft, ignore_errors=True)


def _install(draft: Path, model: Path, number: int, config: ModelConfig | None, staging: Path) -> Path:
    """The version folder `number` of `model`, renamed into place after everything it holds is on the disk."""
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
    """`model` has this config and, as newest version, these files; what it has already stays untouched."""
    present = versions(model)
    if present != earlier_than(draft, model):
        with _config_replaced(model, config, staging):
            return
    number = number_of(present[-1]) + 1 if present else 1
    _install(draft, model, number, config, staging)
    _discard(versions(model)[:-VERSIONS_KEPT], staging)


@contextmanager
def _config_replaced(model: Path, config: ModelConfig | None, staging: Path) -> Iterator[None]:
    """`model` has this config, untouched if it is the same, and has the old one again if the disk then refuses."""
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
    """`draft` holds what a Python model needs of an artifact: the manifest, these of its files, the program."""
    for name in (MANIFEST, *files):
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(version / name, draft / name)
    shutil.copyfile(STEP_SOURCES / program, draft / STEP_FILE)
    (draft / "__pycache__").write_text(NO_BYTECODE)
    return draft


def _contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def _discard(folders: list[Path], staging: Path) -> None:
    """Remove folders; each vanishes from the repository by one rename before it is taken apart."""
    for folder in folders:
        folder.rename(staging / f"{folder.parent.name}-{folder.name}")
