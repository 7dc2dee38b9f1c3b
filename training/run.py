"""Train models and write their checkpoints: python -m training.run MODEL..."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtimes.errors import InputError
from runtimes.host.cli import command, flags, parser, settings, table
from training.checkpoint import Checkpoint, exists, save_checkpoint
from training.loop import COMMON, check_training, fit, is_first_process
from training.spec import Config, Evaluation, ModelSpec, Recipe, all_specs, find_spec, override


@command
def main(argv: list[str] | None = None) -> int:
    """Train every named model; one table of metrics beside their baselines at the end."""
    arguments, more = _parser().parse_known_args(argv)
    specs = list(choose(arguments.models))
    changes = {**settings(arguments.set), **flags(more)}
    if arguments.if_missing:
        specs = [spec for spec in specs if not exists(arguments.out / spec.name)]
    runs = [(spec, *configure(spec, arguments.preset, changes)) for spec in specs]
    if arguments.resume and not any(_has_state(arguments.work, spec) for spec in specs):
        raise InputError(f"--resume: expected states of an earlier run in --work, found none in {arguments.work}")
    for spec, config, training in runs:
        recipe = spec.recipe()(config, training, arguments.data)
        for line in recipe.summary() if is_first_process() else ():
            print(f"{spec.name}: {line}", file=sys.stderr)
        folder = arguments.out / spec.name
        done = train(spec, recipe, arguments.preset, folder, arguments.work, arguments.resume)
        if done is None:
            continue
        checkpoint, evaluation = done
        print(f"\n{spec.name} -> {checkpoint.folder} (step {checkpoint.step}, {checkpoint.digest[:12]})")
        print(evaluation_table(evaluation))
    return 0


def choose(names: Sequence[str]) -> Iterator[ModelSpec]:
    """The models of these names, or all; `InputError` for one that is a part of another."""
    for spec in all_specs().values() if names == ["all"] else map(find_spec, names):
        if spec.trained:
            yield spec
        elif names != ["all"]:
            raise InputError(f"{spec.name} is a part of {spec.checkpoint}; train that")


def configure(spec: ModelSpec, preset: str, changes: dict[str, str]) -> tuple[Config, Config]:
    """The preset's config and training settings with the user's changes; `InputError` for a setting neither has."""
    chosen = spec.preset(preset)
    return changed(spec, chosen.config, {**COMMON, **chosen.training}, changes)


def changed(spec: ModelSpec, config: Config, training: Config, changes: dict[str, str]) -> tuple[Config, Config]:
    """A config and training settings with the user's changes, and with what follows from these."""
    known = (config.keys() | training.keys()) - set(spec.fixed)
    for name in changes.keys() - known:
        raise InputError(f"{spec.name} --set: expected a setting of {', '.join(sorted(known))}; found '{name}'")
    own = {name: text for name, text in changes.items() if name in config}
    by_hand = {name: text for name, text in changes.items() if name in training}
    config = spec.resolve_config(override(config, own))
    training = override(spec.implied(config, override(training, by_hand)), by_hand)
    check_training(training)
    return config, training


def train(
    spec: ModelSpec, recipe: Recipe, preset: str, folder: Path, work: Path | None, resume: bool
) -> tuple[Checkpoint, Evaluation] | None:
    """The checkpoint of a newly trained model and its evaluation; None in the further processes of torchrun.

    `work` keeps the Trainer's own states, from which `resume` goes on where there are any.
    """
    module, step = recipe.fit(), 0
    if module is None:
        states = work / spec.name if work else folder.with_name(f".{folder.name}.states")
        trainer = fit(spec, recipe, states, keep=work is not None, resume=resume and _has_state(work, spec))
        module, state = trainer.trained, trainer.state
        step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    if not is_first_process():
        return None
    evaluation = recipe.evaluate(module)
    checkpoint = save_checkpoint(
        folder,
        spec,
        module,
        preset=preset,
        config=recipe.config,
        training=recipe.training,
        step=step,
        metrics=evaluation.metrics,
        sample_inputs=recipe.sample_inputs(),
    )
    return checkpoint, evaluation


class Help(argparse.Action):
    """Prints the parser's own help, then every setting of the models named so far with what it means."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        for name in namespace.models or ():
            spec = find_spec(name)
            chosen = spec.preset("tiny")
            defaults = {**chosen.config, **COMMON, **chosen.training}
            rows = [(key, defaults[key], spec.notes.get(key, "")) for key in defaults if key not in spec.fixed]
            print(f"\nsettings of {name}\n{table(['setting', 'tiny', 'what it is'], rows)}")
        parser.exit()


def _has_state(work: Path | None, spec: ModelSpec) -> bool:
    return work is not None and any((work / spec.name).glob("checkpoint-*"))


def evaluation_table(evaluation: Evaluation) -> str:
    """Metrics in rows, the model and its baselines in columns."""
    names = list(evaluation.baselines)
    rows = [
        (metric, f"{value:.4f}", *(_cell(evaluation.baselines[name].get(metric)) for name in names))
        for metric, value in evaluation.metrics.items()
    ]
    return table(["metric", "model", *names], rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _parser() -> Any:
    result = parser(
        "training.run",
        __doc__.partition(":")[0] + ".",
        "policy_gru",
        "policy_mamba --data replays/ --out checkpoints --set lr=3e-4 --windows lazy",
        add_help=False,
    )
    result.add_argument("models", nargs="+", metavar="MODEL", help="model names, or 'all'")
    result.add_argument(
        "-h", "--help", action=Help, help="show this, and the settings of the models named before it, and exit"
    )
    result.add_argument("--preset", default="tiny", help="size of the model (default: tiny)")
    result.add_argument("--data", type=Path, help="folder with the model's data (default: synthetic)")
    result.add_argument(
        "--out", type=Path, default=Path("checkpoints"), help="where checkpoints go (default: checkpoints)"
    )
    result.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; --NAME VALUE does too"
    )
    result.add_argument("--if-missing", action="store_true", help="leave models alone that have a checkpoint")
    result.add_argument("--work", type=Path, help="keep the Trainer's states here, so that --resume can go on")
    result.add_argument("--resume", action="store_true", help="go on from the newest state in --work")
    return result


if __name__ == "__main__":
    sys.exit(main())
