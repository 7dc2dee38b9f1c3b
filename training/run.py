"""Train models and write their checkpoints: python -m training.run MODEL..."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtimes.errors import InputError
from runtimes.host.cli import command, flags, hidden_alias, models_argument, parser, settings, table
from training.checkpoint import Checkpoint, exists
from training.loop import has_state, is_first_process, train
from training.recipe import Evaluation, data_arguments
from training.settings import configure, defaults
from training.spec import ModelSpec, all_specs, find_spec

Done = tuple[ModelSpec, Checkpoint, Evaluation, float]


@command
def main(argv: list[str] | None = None) -> int:
    """Train every named model; metrics beside those of the baselines at the end."""
    arguments, more = _parser().parse_known_args(argv)
    specs = list(choose(arguments.models))
    changes = {**settings(arguments.set), **flags(more)}
    if arguments.if_missing:
        specs = [spec for spec in specs if not exists(arguments.out / spec.name)]
    runs = [(spec, *configure(spec, arguments.preset, changes)) for spec in specs]
    state_dir = arguments.state_dir
    if arguments.resume and not any(has_state(state_dir, spec) for spec in specs):
        raise InputError(f"--resume: expected states of an earlier run in --state-dir, found none in {state_dir}")
    done: list[Done] = []
    for spec, config, training in runs:
        started = time.perf_counter()
        recipe = spec.training.recipe()(config, training, arguments.data)
        for line in recipe.summary() if is_first_process() else ():
            print(f"{spec.name}: {line}", file=sys.stderr)
        folder = arguments.out / spec.name
        result = train(spec, recipe, arguments.preset, folder, state_dir=state_dir, resume=arguments.resume)
        if result is not None:
            done.append((spec, *result, time.perf_counter() - started))
    if len(done) == 1:
        ((spec, checkpoint, evaluation, _),) = done
        print(f"\n{spec.name} -> {checkpoint.folder} (step {checkpoint.step}, {checkpoint.digest[:12]})")
        print(evaluation.table())
    elif done:
        print(f"\n{results_table(done)}")
    return 0


def choose(names: Sequence[str]) -> Iterator[ModelSpec]:
    """The models of these names, or all that are trained; `InputError` for a part of another model."""
    if list(names) == ["all"]:
        yield from (spec for spec in all_specs().values() if spec.trained)
        return
    for spec in map(find_spec, names):
        spec.training  # noqa: B018  raises InputError for a model that is not trained
        yield spec


def results_table(done: Sequence[Done]) -> str:
    """A row for each model: its first metric that a baseline has too, beside the best of the baselines."""
    rows = []
    for spec, checkpoint, evaluation, seconds in done:
        shared = [name for name in evaluation.metrics if any(name in found for found in evaluation.baselines.values())]
        metric = shared[0] if shared else next(iter(evaluation.metrics))
        compared = " ".join(
            f"{name} {found[metric]:.4f}" for name, found in evaluation.baselines.items() if metric in found
        )
        value = f"{evaluation.metrics[metric]:.4f}"
        rows.append((spec.name, checkpoint.step, f"{seconds:.0f}", metric, value, compared or "-", checkpoint.folder))
    return table(["model", "step", "seconds", "metric", "value", "baselines", "checkpoint"], rows)


class Help(argparse.Action):
    """Prints the parser's own help, then every setting of the models named so far with its meaning."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any) -> None:
        parser.print_help()
        for spec in choose(namespace.models or ()):
            config, training = defaults(spec, "tiny")
            notes, known = spec.training.notes, {**config, **training}
            rows = [(name, known[name], notes.get(name, "")) for name in known if name not in spec.interface.fixed]
            print(f"\nsettings of {spec.name}\n{table(['setting', 'tiny', 'meaning'], rows)}")
        parser.exit()


def _parser() -> Any:
    result = parser(
        "training.run",
        __doc__.partition(":")[0] + ".",
        "policy_gru",
        "policy_mamba --data replays/ --out checkpoints --set lr=3e-4 --windows lazy",
        add_help=False,
    )
    models_argument(result, "names of models, or 'all'; `python -m training` lists them", least=1)
    result.add_argument(
        "-h", "--help", action=Help, help="show this, and the settings of the models named before it, and exit"
    )
    data_arguments(result)
    result.add_argument(
        "--out", type=Path, default=Path("checkpoints"), help="folder of the checkpoints (default: %(default)s)"
    )
    result.add_argument(
        "--if-missing", action="store_true", help="skip models that have a checkpoint (default: train them again)"
    )
    result.add_argument(
        "--state-dir", type=Path, help="folder that keeps the Trainer's states for --resume (default: none is kept)"
    )
    hidden_alias(result, "--work", "--state-dir")
    result.add_argument("--resume", action="store_true", help="continue from the newest state in --state-dir")
    return result


if __name__ == "__main__":
    sys.exit(main())
