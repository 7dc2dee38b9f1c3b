"""Judge a checkpoint beside baselines that need no model: python -m training.evaluate MODEL --checkpoint DIR"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from runtimes.command import command, parser, settings
from training.checkpoint import Checkpoint, restore
from training.run import configure, evaluation_table
from training.spec import find_spec


@command
def main(argv: list[str] | None = None) -> int:
    """Print the metrics of a checkpoint on the validation part of the data."""
    result = parser(
        "training.evaluate",
        __doc__.partition(":")[0] + ".",
        "policy_gru --checkpoint checkpoints/policy_gru",
        "policy_gru --checkpoint checkpoints/policy_gru --data replays/ --json",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    result.add_argument("--data", type=Path, help="folder with the model's data (default: synthetic)")
    result.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting it was trained with"
    )
    result.add_argument("--json", action="store_true", help="print JSON only")
    arguments = result.parse_args(argv)

    spec = find_spec(arguments.model)
    checkpoint = Checkpoint.load(arguments.checkpoint)
    changes = settings(arguments.set)
    _, now = configure(spec, checkpoint.preset, changes)
    training = {**now, **{name: then for name, then in checkpoint.training.items() if name not in changes}}
    recipe = spec.recipe()(checkpoint.config, training, arguments.data)
    evaluation = recipe.evaluate(restore(checkpoint, spec))
    if arguments.json:
        print(json.dumps({"model": spec.name, **asdict(evaluation)}))
    else:
        print(evaluation_table(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(main())
