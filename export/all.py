"""Convert checkpoints, verify the results and publish them: python -m export.all --target onnx"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from export.convert import Cell, Options, Outcome, fill
from export.quantization.calibration_texts import CalibrationTexts, read_texts
from export.source import LastSource
from export.target import Target
from export.triton.config import Scheduling
from runtimes import plugins
from runtimes.errors import InputError
from runtimes.host.cli import command, parser, table
from runtimes.host.output_capture import native_talk_on_stderr
from training.spec import all_specs, find_spec

TEXTS = CalibrationTexts()


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
