"""Convert checkpoints, prove what comes out, and publish it: python -m export.all --target onnx"""

import json
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export import parity
from export.key import artifact_key, library_versions
from export.quantization.calibration_texts import CalibrationTexts, read_texts
from export.source import LastSource, Source
from export.target import Built, Target
from export.triton.config import UNLIMITED, Scheduling
from export.triton.repository import drafting, publish, publish_again, publish_ensemble, reschedule
from runtimes import plugins
from runtimes.artifact import ASSETS, Artifact, Facts, artifact_name, digests
from runtimes.errors import FOREIGN, InputError, SlipwayError, error_text, one_line
from runtimes.host.cli import command, parser, table
from runtimes.host.output_capture import native_talk_on_stderr
from runtimes.repository import artifacts_root, newest, published
from runtimes.runtime import open_runtime
from training.checkpoint import Checkpoint, exists
from training.language_model import NotADecoder
from training.spec import ModelSpec, all_specs, find_spec

TEXTS = CalibrationTexts()
UNTOUCHED = Facts(built=False, deserialized=False, ran=False, compared=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One place in the matrix: a model, a target and a precision."""

    spec: ModelSpec
    target: Target
    precision: str

    @property
    def label(self) -> str:
        return f"{self.spec.name} {self.target.name} {self.precision}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What all cells of a run have in common.

    mounted_at  where the repository lies for the server that reads it; where it lies here, if None
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
    """What became of a cell: ok, reused, skipped or failed, with the reason where there is one to tell."""

    model: str
    target: str
    precision: str
    status: str
    reason: str = ""
    artifact: str = ""
    bytes: int = 0
    seconds: float = 0.0
    parity: dict[str, float] = field(default_factory=dict)
    facts: Facts = UNTOUCHED


@command
def main(argv: list[str] | None = None) -> int:
    """Fill the matrix of models and targets; one failing cell does not stop the rest."""
    arguments = _parser().parse_args(argv)
    cells = list(choose_cells(arguments.model, arguments.target, arguments.precision))
    options = read_options(arguments)
    if not options.dry_run:
        options.repository.mkdir(parents=True, exist_ok=True)
    outcomes, sources = [], LastSource()
    with native_talk_on_stderr():  # TensorRT-RTX warns on the standard output
        for cell in (bar := tqdm(cells, disable=not sys.stderr.isatty(), leave=False)):
            bar.set_description(cell.label)
            outcomes.append(fill(cell, options, sources))
    if arguments.json:
        print(json.dumps({"cells": [asdict(outcome) for outcome in outcomes]}))
    else:
        print(outcome_table(outcomes))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def choose_cells(models: Sequence[str], targets: Sequence[str], precisions: Sequence[str]) -> Iterator[Cell]:
    """The cells asked for; `InputError` for a model, target or precision that does not exist."""
    specs = [find_spec(name) for name in models] or list(all_specs().values())
    names = plugins.names("export.targets") if "all" in targets else targets
    chosen: list[Target] = [plugins.load("export.targets", name, "TARGET") for name in names]
    known = sorted({precision for target in chosen for precision in target.precisions})
    for precision in precisions:
        if precision not in known:
            raise InputError(f"expected a precision of {', '.join(known)}; found '{precision}'")
    for spec in specs:
        for target in chosen:
            for precision in precisions or target.precisions[:1]:
                yield Cell(spec=spec, target=target, precision=precision)


def fill(cell: Cell, options: Options, sources: LastSource) -> Outcome:
    """What became of one cell. Nothing that was not proved is published; nothing is dropped without a reason."""
    outcome = Outcome(model=cell.spec.name, target=cell.target.name, precision=cell.precision, status="skipped")
    started = time.perf_counter()
    try:
        if reason := why_skipped(cell, options.checkpoints):
            return replace(outcome, reason=reason)
        checkpoint = Checkpoint.load(options.checkpoints / cell.spec.checkpoint)
        if reason := cell.spec.absent(checkpoint.config):
            return replace(outcome, reason=reason)
        key = artifact_key(cell.spec, cell.target, cell.precision, checkpoint, options.texts)
        found = newest(options.repository, artifact_name(cell.spec.name, cell.target.name, cell.precision))
        if found and not options.force and (artifact := reusable(found, key)):
            if not options.dry_run:
                found = publish_again(found, artifact, options.repository, mounted_at=options.mounted_at)
                reschedule(artifact, options.repository, options.scheduling)
            return _done(outcome, artifact, found, "reused", started)
        if options.dry_run:
            return replace(outcome, reason="dry run: would be exported")
        artifact, folder = export_one(cell, sources.of(cell.spec, checkpoint, options.texts), key, options)
        return _done(outcome, artifact, folder, "ok", started)
    except NotADecoder as error:
        return replace(outcome, reason=one_line(error))
    except _conversion_errors() as error:
        seconds = time.perf_counter() - started
        if not isinstance(error, SlipwayError | OSError):
            traceback.print_exception(error)  # nobody's mistake that is known: where it came from is part of the answer
        return replace(outcome, status="failed", reason=error_text(error), seconds=seconds)


def why_skipped(cell: Cell, checkpoints: Path) -> str | None:
    """The reason why a cell stays empty, or None."""
    spec, target = cell.spec, cell.target
    if reason := spec.skips.get(target.name) or target.refuse(spec):
        return reason
    if cell.precision not in target.precisions:
        return f"target {target.name} has no {cell.precision}, only {', '.join(target.precisions)}"
    if cell.precision not in spec.tolerance:
        return f"no tolerance is stated for {spec.name} in {cell.precision}"
    if not exists(checkpoints / spec.checkpoint):
        return f"no checkpoint in {checkpoints / spec.checkpoint}; make one: python -m training.run {spec.checkpoint}"
    return None


def reusable(folder: Path, key: str) -> Artifact | None:
    """The published artifact in `folder` if it has this key and its files are what they were."""
    try:
        artifact = Artifact.load(folder)
        if artifact.key != key:
            return None
        artifact.verify_files(folder)
    except SlipwayError:  # damaged: it is made again
        return None
    return artifact


def export_one(cell: Cell, source: Source, key: str, options: Options) -> tuple[Artifact, Path]:
    """Convert, prove and publish one cell; `ParityError` and nothing published if it is not proved."""
    repository = options.repository
    with drafting(repository) as draft:
        artifact, built = convert(cell, source, key, draft)
        artifact = prove(artifact, source, draft, built)
        served = built.served and artifact.proved
        folder = publish(
            draft,
            artifact,
            repository,
            served=served,
            scheduling=options.scheduling,
            mounted_at=options.mounted_at,
        )
    if served and built.speaks_tensors and leads(artifact, repository):
        publish_ensemble(artifact, repository, options.scheduling)
    return artifact, folder


def leads(artifact: Artifact, repository: Path) -> bool:
    """Whether the ensemble goes through this artifact: onnx before all other targets, and these by name.

    Of each target only its first precision counts, and of all artifacts only those of the same checkpoint: an ensemble
    is of the newest. What is damaged, or of an earlier format and to be exported again, counts for nothing.
    """
    found = [artifact]
    for root in published(repository):
        if root.is_relative_to(artifacts_root(repository, True)):
            with suppress(SlipwayError):
                found.append(Artifact.load(root))
    alike = [each for each in found if (each.model, each.checkpoint) == (artifact.model, artifact.checkpoint)]
    first = {
        name: plugins.load("export.targets", name, "TARGET").precisions[0] for name in plugins.names("export.targets")
    }
    able = [each.target for each in alike if each.precision == first.get(each.target)]
    best = min(able, key=lambda target: (target != "onnx", target), default=None)
    return artifact.target == best and artifact.precision == first[best]


def convert(cell: Cell, source: Source, key: str, draft: Path) -> tuple[Artifact, Built]:
    """The artifact that the empty folder `draft` now holds, built and not yet proved."""
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
        facts=replace(UNTOUCHED, built=True),
        note=built.not_run_reason or "",
    )
    artifact.save(draft)
    return artifact, built


def prove(artifact: Artifact, source: Source, draft: Path, built: Built) -> Artifact:
    """The artifact with its proof, saved; `ParityError` if it does not say what the original says.

    Where this machine cannot run it, an engine that reads the same numbers is compared instead; that is not a proof of
    the artifact.
    """
    parity.require_proof(built.checks)
    if built.not_run_reason is None:
        candidate = open_runtime(draft, device=built.device)
        facts, prefix = Facts(built=True, deserialized=True, ran=True, compared=True), ""
    elif built.proxy_engine:
        candidate = open_runtime(draft, engine=built.proxy_engine)
        facts, prefix = artifact.facts, f"{built.proxy_engine}_"
        artifact = replace(artifact, note=f"{artifact.note}; what it was made of is proved in {built.proxy_engine}")
    else:
        return artifact
    with candidate:
        checks = parity.prove(candidate, source, artifact.precision)
    parity.require_proof(checks)
    found = {f"{prefix}{name}": check for name, check in checks.items()}
    proved = replace(artifact, parity={**built.checks, **found}, facts=facts)
    proved.save(draft)
    return proved


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """The matrix as text: how far each artifact got, and its worst difference in units of the tolerance."""
    rows = []
    for outcome in outcomes:
        compared = outcome.parity if outcome.facts.compared else {}
        differences = [value for name, value in compared.items() if "difference" in name]
        got = [name for name in ("built", "deserialized", "ran", "compared") if getattr(outcome.facts, name)]
        rows.append(
            (
                outcome.model,
                outcome.target,
                outcome.precision,
                outcome.status,
                f"{outcome.bytes / 1e6:.2f}" if outcome.bytes else "-",
                f"{outcome.seconds:.1f}",
                f"{max(differences):.3f}" if differences else "-",
                ", ".join(got) or "-",
                outcome.reason or outcome.artifact,
            )
        )
    header = ["model", "target", "precision", "status", "MB", "seconds", "difference", "facts", "artifact or reason"]
    return table(header, rows) + "\n\ndifference: the largest one, in units of what the tolerance allows"


def _done(outcome: Outcome, artifact: Artifact, folder: Path, status: str, started: float) -> Outcome:
    return replace(
        outcome,
        status=status,
        reason=artifact.note,
        artifact=str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder),
        bytes=sum((folder / name).stat().st_size for name in artifact.files),
        seconds=time.perf_counter() - started,
        parity={name: check.value for name, check in artifact.parity.items()},
        facts=artifact.facts,
    )


def _conversion_errors() -> tuple[type[Exception], ...]:
    """What ends a cell and not the matrix: our errors, a full disk, what torch raises for what it cannot convert."""
    own = (SlipwayError, OSError)
    if "torch" not in sys.modules:  # nothing was converted yet, and importing torch takes seconds
        return own
    from torch._dynamo.exc import TorchDynamoException
    from torch._export.verifier import SpecViolationError
    from torch.onnx import OnnxExporterError

    return (*own, *FOREIGN, TorchDynamoException, SpecViolationError, OnnxExporterError)


def read_options(arguments: Any) -> Options:
    """`InputError` for texts that are none, or a mount that is no whole path."""
    mounted_at = arguments.mounted_at
    if mounted_at is not None and not mounted_at.is_absolute():
        raise InputError(f"--mounted-at: expected a whole path such as /models, found '{mounted_at}'")
    texts = CalibrationTexts(
        file=arguments.calibration, samples=arguments.calibration_samples, tokens=arguments.calibration_tokens
    )
    if texts.file is not None and not list(read_texts(texts.file)):
        raise InputError(f"{texts.file}: expected texts to quantize on, found none")
    return Options(
        checkpoints=arguments.checkpoints,
        repository=arguments.repository,
        texts=texts,
        scheduling=Scheduling(
            instances=arguments.instances, queue=arguments.queue, timeout_ms=arguments.queue_timeout_ms
        ),
        mounted_at=mounted_at,
        force=arguments.force,
        dry_run=arguments.dry_run,
    )


def _parser() -> Any:
    result = parser(
        "export.all",
        __doc__.partition(":")[0] + ".",
        "--target onnx",
        "--target all --model policy_gru --precision fp16 --json",
    )
    result.add_argument("--target", action="append", required=True, help="onnx, tensorrt, torch, ... or all")
    result.add_argument("--model", action="append", default=[], help="one model (default: all there are)")
    result.add_argument("--precision", action="append", default=[], help="fp32, fp16, ... (default: the target's own)")
    result.add_argument("--checkpoints", type=Path, default=Path("checkpoints"), help="folder of checkpoints")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where to publish")
    result.add_argument("--mounted-at", type=Path, help="path of the repository in the container that serves it")
    group = result.add_argument_group("texts that language models are quantized on")
    group.add_argument("--calibration", type=Path, help=".txt or .jsonl (default: the checkpoint's own)")
    group.add_argument("--calibration-samples", type=int, default=TEXTS.samples, help="texts (default: %(default)s)")
    group.add_argument("--calibration-tokens", type=int, default=TEXTS.tokens, help="of each (default: %(default)s)")
    result.add_argument("--dry-run", action="store_true", help="say what would be done")
    result.add_argument("--force", action="store_true", help="convert again what could be reused")
    result.add_argument(
        "--instances", type=int, default=1, help="copies of a stateless model and its steps (default: 1)"
    )
    result.add_argument("--queue", type=int, default=0, help="requests that may wait for each; more are refused")
    result.add_argument("--queue-timeout-ms", type=int, default=0, help="how long one may wait before it is refused")
    result.add_argument("--json", action="store_true", help="print JSON only")
    return result


if __name__ == "__main__":
    sys.exit(main())
