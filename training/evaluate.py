"""Judge a model beside baselines that need none: python -m training.evaluate MODEL --checkpoint DIR"""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from runtimes.host.cli import command, flags, parser, settings
from training.checkpoint import Checkpoint, restore
from training.loop import COMMON
from training.run import changed, configure, evaluation_table
from training.spec import Evaluation, ModelSpec, find_spec


@command
def main(argv: list[str] | None = None) -> int:
    """Print the metrics of a checkpoint on the validation part of the data, or of what the settings alone describe."""
    result = parser(
        "training.evaluate",
        __doc__.partition(":")[0] + ".",
        "policy_gru --checkpoint checkpoints/policy_gru",
        "policy_gru --checkpoint checkpoints/policy_gru --data replays/ --json",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--checkpoint", type=Path, help="folder of the checkpoint")
    result.add_argument("--data", type=Path, help="folder with the model's data (default: synthetic)")
    result.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; --NAME VALUE does too"
    )
    result.add_argument("--json", action="store_true", help="print JSON only")
    arguments, more = result.parse_known_args(argv)

    spec = find_spec(arguments.model)
    changes = {**settings(arguments.set), **flags(more)}
    if arguments.checkpoint is None:
        config, training = configure(spec, "tiny", changes)
        evaluation = spec.recipe()(config, training, arguments.data).evaluate_settings()
    else:
        evaluation = of_checkpoint(spec, Checkpoint.load(arguments.checkpoint), changes, arguments.data)
    if arguments.json:
        print(json.dumps({"model": spec.name, **asdict(evaluation)}))
    else:
        print(evaluation_table(evaluation))
    return 0


def of_checkpoint(spec: ModelSpec, checkpoint: Checkpoint, changes: dict[str, str], data: Path | None) -> Evaluation:
    """How good it is with the settings it was trained with, but for `changes`.

    `InputError` or `ArtifactError` for a change with which the checkpoint is another model's.
    """
    trained = {**COMMON, **spec.preset(checkpoint.preset).training, **checkpoint.training}
    config, training = changed(spec, dict(checkpoint.config), trained, changes)
    recipe = spec.recipe()(config, training, data)
    return recipe.evaluate(restore(replace(checkpoint, config=config), spec))


if __name__ == "__main__":
    sys.exit(main())
