"""One cell of the matrix: from a checkpoint to a verified, published artifact, or the reason why there is none."""

import shutil
import sys
import time
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path

from export import parity
from export.calibration_texts import CalibrationTexts
from export.key import artifact_key, library_versions
from export.source import LastSource, Source
from export.target import Built, Target
from export.triton.ensemble import is_ensemble_target
from export.triton.repository import drafting, publish, publish_again, publish_ensemble, reschedule
from export.triton.scheduling import UNLIMITED, Scheduling
from runtimes import plugins
from runtimes.artifact import ASSETS, Artifact, Facts, artifact_name, digests
from runtimes.errors import FOREIGN, SlipwayError, error_text, one_line
from runtimes.repository import newest
from runtimes.runtime import open_runtime
from training.checkpoint import Checkpoint, exists
from training.language_model import NotADecoder
from training.spec import ModelSpec, find_spec

NOTHING_DONE = Facts(built=False, deserialized=False, ran=False, compared=False)
DRY_RUN = "dry run: would be exported"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One place in the matrix: a model, a target and a precision."""

    spec: ModelSpec
    target: Target
    precision: str

    @property
    def label(self) -> str:
        return f"{self.spec.name} {self.target.name} {self.precision}"


def find_cell(model: str, target: str, precision: str) -> Cell:
    """The cell of these names; `InputError` for a name that does not exist."""
    return Cell(spec=find_spec(model), target=plugins.load("export.targets", target, "TARGET"), precision=precision)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The settings that all cells of a run share.

    mounted_at  path of the repository on the server that reads it; None if that is its path here
    """

    checkpoints: Path
    repository: Path
    texts: CalibrationTexts
    scheduling: Scheduling = UNLIMITED
    mounted_at: Path | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of a cell: its status (ok, reused, skipped or failed), and the reason for one of the last two."""

    model: str
    target: str
    precision: str
    status: str
    reason: str = ""
    artifact: str = ""
    bytes: int = 0
    seconds: float = 0.0
    parity: dict[str, float] = field(default_factory=dict)
    facts: Facts = NOTHING_DONE

    @property
    def exported(self) -> bool:
        """Whether the cell has an artifact, or in a dry run would get one."""
        return self.status in ("ok", "reused") or self.reason == DRY_RUN


def fill(cell: Cell, options: Options, sources: LastSource) -> Outcome:
    """The outcome of one cell. No artifact is published unverified, and none is left out without a reason."""
    started = time.perf_counter()
    try:
        outcome = _fill(cell, options, sources)
    except NotADecoder as error:
        outcome = without_artifact(cell, "skipped", one_line(error))
    except _conversion_errors() as error:
        if not isinstance(error, SlipwayError | OSError):
            traceback.print_exception(error)  # an unforeseen error: its place in the code belongs to the report
        outcome = without_artifact(cell, "failed", error_text(error))
    return outcome if outcome.status == "skipped" else replace(outcome, seconds=time.perf_counter() - started)


def without_artifact(cell: Cell, status: str, reason: str) -> Outcome:
    """The outcome of a cell that was skipped or has failed."""
    return Outcome(
        model=cell.spec.name, target=cell.target.name, precision=cell.precision, status=status, reason=reason
    )


def _fill(cell: Cell, options: Options, sources: LastSource) -> Outcome:
    if reason := why_skipped(cell, options.checkpoints):
        return without_artifact(cell, "skipped", reason)
    checkpoint = Checkpoint.load(options.checkpoints / cell.spec.checkpoint)
    if reason := cell.spec.interface.absent(checkpoint.config):
        return without_artifact(cell, "skipped", reason)
    key = artifact_key(cell.spec, cell.target, cell.precision, checkpoint, options.texts)
    found = newest(options.repository, artifact_name(cell.spec.name, cell.target.name, cell.precision))
    if found and not options.force and (artifact := reusable(found, key)):
        return _with_artifact(artifact, _reuse(artifact, found, options), "reused")
    if options.dry_run:
        return without_artifact(cell, "skipped", DRY_RUN)
    artifact, folder = _export(cell, sources.of(cell.spec, checkpoint, options.texts), key, options)
    return _with_artifact(artifact, folder, "ok")


def why_skipped(cell: Cell, checkpoints: Path) -> str | None:
    """Why the cell is skipped, or None."""
    spec, target = cell.spec, cell.target
    if reason := spec.export.skips.get(target.name) or target.refuse(spec):
        return reason
    if cell.precision not in target.precisions:
        return f"target {target.name} has no {cell.precision}, only {', '.join(target.precisions)}"
    if cell.precision not in spec.parity.tolerance:
        return f"no tolerance is stated for {spec.name} in {cell.precision}"
    if not exists(checkpoints / spec.checkpoint):
        return f"no checkpoint in {checkpoints / spec.checkpoint}; make one: python -m training.run {spec.checkpoint}"
    return None


def reusable(folder: Path, key: str) -> Artifact | None:
    """The published artifact in `folder` if it has this key and its files are unchanged."""
    try:
        artifact = Artifact.load(folder)
        if artifact.key != key:
            return None
        artifact.verify_files(folder)
    except SlipwayError:  # damaged: it is exported again
        return None
    return artifact


def _reuse(artifact: Artifact, found: Path, options: Options) -> Path:
    """The folder of the artifact, published for the present server path and scheduling."""
    if options.dry_run:
        return found
    folder = publish_again(found, artifact, options.repository, mounted_at=options.mounted_at)
    reschedule(artifact, options.repository, options.scheduling)
    return folder


def _export(cell: Cell, source: Source, key: str, options: Options) -> tuple[Artifact, Path]:
    """Convert, verify and publish one cell; `ParityError`, and nothing published, if a check fails."""
    repository = options.repository
    with drafting(repository) as draft:
        artifact, built = convert(cell, source, key, draft)
        artifact = verify_artifact(artifact, source, draft, built)
        served = built.served and artifact.verified
        folder = publish(
            draft,
            artifact,
            repository,
            served=served,
            scheduling=options.scheduling,
            mounted_at=options.mounted_at,
        )
    if served and is_ensemble_target(artifact, repository):
        publish_ensemble(artifact, repository, options.scheduling)
    return artifact, folder


def convert(cell: Cell, source: Source, key: str, draft: Path) -> tuple[Artifact, Built]:
    """The artifact in the folder `draft`, which was empty: built, and not verified yet."""
    checkpoint = source.checkpoint
    if checkpoint.assets.is_dir():
        shutil.copytree(checkpoint.assets, draft / ASSETS)
    built = cell.target.convert(source, cell.precision, draft)
    artifact = Artifact(
        model=cell.spec.name,
        target=cell.target.name,
        runtime=cell.target.runtime,
        precision=cell.precision,
        pipeline=cell.spec.pipeline,
        config=dict(checkpoint.config),
        signature=source.signature,
        files=digests(draft),
        built_with={**library_versions(cell.target.packages), **built.built_with},
        checkpoint=checkpoint.digest,
        key=key,
        facts=replace(NOTHING_DONE, built=True),
        note=built.not_run_reason or "",
    )
    artifact.save(draft)
    return artifact, built


def verify_artifact(artifact: Artifact, source: Source, draft: Path, built: Built) -> Artifact:
    """The artifact with its parity checks, saved; `ParityError` if one fails.

    Where this machine cannot run the artifact, its proxy engine is compared instead, and the artifact itself does not
    count as verified.
    """
    parity.require_passed(built.checks)
    if built.not_run_reason is None:
        candidate = open_runtime(draft, device=built.device)
        facts, prefix = Facts(built=True, deserialized=True, ran=True, compared=True), ""
    elif built.proxy_engine:
        candidate = open_runtime(draft, engine=built.proxy_engine)
        facts, prefix = artifact.facts, f"{built.proxy_engine}_"
        artifact = replace(artifact, note=f"{artifact.note}; its source is verified in {built.proxy_engine}")
    else:
        return artifact
    with candidate:
        checks = parity.check_parity(candidate, source, artifact.precision)
    parity.require_passed(checks)
    found = {f"{prefix}{name}": check for name, check in checks.items()}
    verified = replace(artifact, parity={**built.checks, **found}, facts=facts)
    verified.save(draft)
    return verified


def _with_artifact(artifact: Artifact, folder: Path, status: str) -> Outcome:
    return Outcome(
        model=artifact.model,
        target=artifact.target,
        precision=artifact.precision,
        status=status,
        reason=artifact.note,
        artifact=str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder),
        bytes=sum((folder / name).stat().st_size for name in artifact.files),
        parity={name: check.value for name, check in artifact.parity.items()},
        facts=artifact.facts,
    )


def _conversion_errors() -> tuple[type[Exception], ...]:
    """The errors that end a cell and not the run: ours, a full disk, torch's for a model that it cannot convert."""
    own = (SlipwayError, OSError)
    if "torch.export" not in sys.modules:  # nothing was traced yet, and importing torch takes seconds
        return own
    from torch._dynamo.exc import TorchDynamoException
    from torch._export.verifier import SpecViolationError
    from torch.onnx import OnnxExporterError

    return (*own, *FOREIGN, TorchDynamoException, SpecViolationError, OnnxExporterError)
