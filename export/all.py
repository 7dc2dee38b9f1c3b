"""Convert checkpoints, verify the results and publish them: python -m export.all --target onnx"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from export.calibration_texts import CalibrationTexts, read_texts
from export.convert import Cell, Options, Outcome
from export.jobs import fill_all
from export.target import Target
from export.triton.scheduling import UNLIMITED, Scheduling
from runtimes import plugins
from runtimes.errors import InputError
from runtimes.host.cli import (
    REPOSITORY,
    command,
    json_argument,
    models_argument,
    mounted_at_argument,
    parser,
    precision_argument,
    program,
    repository_argument,
    table,
    target_argument,
    unknown_name,
)
from runtimes.host.output_capture import native_talk_on_stderr
from training.spec import all_specs

TEXTS = CalibrationTexts()
ALL = "all"
FACTS = ("built", "deserialized", "ran", "compared")


@command
def main(argv: list[str] | None = None) -> int:
    """Fill the matrix of models and targets; a failed cell does not stop the others.

    Status 1 if a cell failed, or if a model that is named on the command line has no artifact afterwards.
    """
    arguments = _parser().parse_args(argv)
    cells = list(choose_cells(arguments.models, arguments.target, arguments.precision))
    options = read_options(arguments)
    if not options.dry_run:
        options.repository.mkdir(parents=True, exist_ok=True)
    with native_talk_on_stderr():  # TensorRT-RTX warns on the standard output
        outcomes = fill_all(cells, options, arguments.jobs)
    if arguments.json:
        print(json.dumps({"cells": [asdict(outcome) for outcome in outcomes]}))
    else:
        print("\n\n".join([outcome_table(outcomes), *next_commands(outcomes, options)]))
    return exit_status(outcomes, arguments.models)


def choose_cells(models: Sequence[str], targets: Sequence[str], precisions: Sequence[str]) -> Iterator[Cell]:
    """The requested cells; `InputError` for a model, target or precision that does not exist."""
    specs, remedy = all_specs(), f"list them: {program.get() or 'python -m export.all'} --help"
    for model in models:
        if model not in (*specs, ALL):
            raise unknown_name("model", model, specs, remedy)
    names = plugins.names("export.targets")
    for target in targets:
        if target not in (*names, ALL):
            raise unknown_name("target", target, names, remedy)
    chosen = _load_targets(names if ALL in targets else list(dict.fromkeys(targets)))
    known = {precision for target in chosen for precision in target.precisions}
    for precision in precisions:
        if precision not in known:
            raise unknown_name("precision", precision, known, remedy)
    for model in dict.fromkeys(specs if ALL in models or not models else models):
        for each in chosen:
            for precision in dict.fromkeys(precisions or each.precisions[:1]):
                yield Cell(spec=specs[model], target=each, precision=precision)


def exit_status(outcomes: Sequence[Outcome], named: Sequence[str]) -> int:
    """1 if a cell failed, or if none of a named model's cells has an artifact, even for a declared reason."""
    failed = any(outcome.status == "failed" for outcome in outcomes)
    exported = {outcome.model for outcome in outcomes if outcome.exported}
    return int(failed or not {*named} - {ALL} <= exported)


def outcome_table(outcomes: Sequence[Outcome]) -> str:
    """The matrix as text: how far each artifact got, and its worst difference in units of the tolerance."""
    header = ["model", "target", "precision", "status", "MB", "seconds", "difference", "facts", "artifact or reason"]
    legend = "difference: the largest of all outputs, in units of the tolerance"
    return f"{table(header, map(_row, outcomes))}\n\n{legend}"


def next_commands(outcomes: Sequence[Outcome], options: Options) -> Iterator[str]:
    """Commands for what was exported; none if nothing was."""
    exported = [outcome for outcome in outcomes if outcome.artifact]
    if not exported:
        return
    best = max(exported, key=lambda outcome: outcome.facts.compared)
    start = "slipway " if program.get() else "python -m runtimes."
    repository = "" if options.repository == REPOSITORY else f" --repository {options.repository}"
    chosen = f"{best.model} --target {best.target} --precision {best.precision}{repository}"
    yield "\n".join(
        (
            "next:",
            f"  {start}predict {chosen} --example",
            f"  {start}bench {best.model}{repository}",
            f"  {start}serve{repository}",
        )
    )


def read_options(arguments: Any) -> Options:
    """`InputError` for calibration texts or a mount path that cannot be used, or for less than one job."""
    mounted_at = arguments.mounted_at
    if mounted_at is not None and not mounted_at.is_absolute():
        raise InputError(f"--mounted-at: expected a whole path such as /models, found '{mounted_at}'")
    if arguments.jobs < 1:
        raise InputError(f"--jobs: expected 1 or more, found {arguments.jobs}")
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


def _row(outcome: Outcome) -> tuple[str, ...]:
    compared = outcome.parity if outcome.facts.compared else {}
    differences = [value for name, value in compared.items() if "difference" in name]
    return (
        outcome.model,
        outcome.target,
        outcome.precision,
        outcome.status,
        f"{outcome.bytes / 1e6:.2f}" if outcome.bytes else "-",
        f"{outcome.seconds:.1f}",
        f"{max(differences):.3f}" if differences else "-",
        ", ".join(name for name in FACTS if getattr(outcome.facts, name)) or "-",
        outcome.reason or outcome.artifact,
    )


def _load_targets(names: Sequence[str]) -> list[Target]:
    return [plugins.load("export.targets", name, "TARGET") for name in names]


def _parser() -> Any:
    targets = _load_targets(plugins.names("export.targets"))
    by_target = "; ".join(f"{target.name}: {', '.join(target.precisions)}" for target in targets)
    result = parser(
        "export.all",
        __doc__.partition(":")[0] + ".",
        "--target onnx",
        "policy_gru policy_mamba --target onnx,torch --precision fp16 --json",
    )
    models_argument(result, f"models, or {ALL} (default: {ALL}): {', '.join(sorted(all_specs()))}")
    target_argument(result, f"targets, or {ALL}: {', '.join(target.name for target in targets)}", required=True)
    precision_argument(result, f"precisions (default: the first one of each target). {by_target}")
    result.add_argument(
        "--checkpoints", type=Path, default=Path("checkpoints"), help="folder of checkpoints (default: %(default)s)"
    )
    repository_argument(result, "folder to publish in")
    mounted_at_argument(result)
    result.add_argument("--jobs", type=int, default=1, help="processes, one model in each (default: %(default)s)")
    result.add_argument("--dry-run", action="store_true", help="print what would be exported, and export nothing")
    result.add_argument("--force", action="store_true", help="export again what could be reused")
    _add_calibration(result)
    _add_scheduling(result)
    json_argument(result)
    return result


def _add_calibration(to: Any) -> None:
    group = to.add_argument_group("texts that language models are quantized on")
    group.add_argument("--calibration", type=Path, help=".txt or .jsonl file (default: the checkpoint's own texts)")
    group.add_argument(
        "--calibration-samples", type=int, default=TEXTS.samples, help="number of texts (default: %(default)s)"
    )
    group.add_argument(
        "--calibration-tokens", type=int, default=TEXTS.tokens, help="tokens of each text (default: %(default)s)"
    )


def _add_scheduling(to: Any) -> None:
    group = to.add_argument_group("scheduling in Triton")
    group.add_argument(
        "--instances",
        type=int,
        default=UNLIMITED.instances,
        help="copies of a stateless model and of its steps (default: %(default)s)",
    )
    group.add_argument(
        "--queue",
        type=int,
        default=UNLIMITED.queue,
        help="requests that may wait for each model, others are rejected; 0 is unlimited (default: %(default)s)",
    )
    group.add_argument(
        "--queue-timeout-ms",
        type=int,
        default=UNLIMITED.timeout_ms,
        help="time after which a waiting request is rejected; 0 is unlimited (default: %(default)s)",
    )


if __name__ == "__main__":
    sys.exit(main())
