"""Evaluate a model beside baselines that need none: python -m training.evaluate MODEL --checkpoint DIR"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from runtimes.host.cli import command, flags, json_argument, models_argument, parser, settings
from training.checkpoint import Checkpoint, restore
from training.recipe import Evaluation, set_argument
from training.settings import changed, configure, defaults
from training.spec import ModelSpec, find_spec


@command
def main(argv: list[str] | None = None) -> int:
    """Print the metrics of a checkpoint on the validation part of the data, or of what the settings alone describe."""
    result = parser(
        "training.evaluate",
        __doc__.partition(":")[0] + ".",
        "policy_gru --checkpoint checkpoints/policy_gru",
        "policy_gru --checkpoint checkpoints/policy_gru --data replays/ --json",
    )
    models_argument(result, "name of the model", least=1, most=1)
    result.add_argument(
        "--checkpoint", type=Path, help="folder of the checkpoint (default: none, for models that settings describe)"
    )
    result.add_argument("--data", type=Path, help="file or folder with the model's data (default: synthetic data)")
    set_argument(result)
    json_argument(result)
    arguments, more = result.parse_known_args(argv)

    spec = find_spec(arguments.model)
    changes = {**settings(arguments.set), **flags(more)}
    if arguments.checkpoint is None:
        config, training = configure(spec, "tiny", changes)
        evaluation = spec.training.recipe()(config, training, arguments.data).evaluate_settings()
    else:
        evaluation = of_checkpoint(spec, Checkpoint.load(arguments.checkpoint), changes, arguments.data)
    if arguments.json:
        print(json.dumps({"model": spec.name, **asdict(evaluation)}))
    else:
        print(evaluation.table())
    return 0


def of_checkpoint(spec: ModelSpec, checkpoint: Checkpoint, changes: dict[str, str], data: Path | None) -> Evaluation:
    """The evaluation with the settings of the checkpoint's training, but for `changes`.

    `InputError` or `ArtifactError` for a change that makes it another model.
    """
    _, preset = defaults(spec, checkpoint.preset)
    config, training = changed(spec, dict(checkpoint.config), {**preset, **checkpoint.training}, changes)
    recipe = spec.training.recipe()(config, training, data)
    return recipe.evaluate(restore(replace(checkpoint, config=config), spec))


if __name__ == "__main__":
    sys.exit(main())
