"""Measure training with frozen models in the loop, and from a store: python -m benchmarks.strategy.store"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from runtimes.cache.store import Store
from runtimes.host.cli import command, flags, parser, settings, table
from training.frozen_store import FrozenInference, fill
from training.models.strategy.recipe import StrategyRecipe
from training.settings import configure
from training.spec import find_spec


@command
def main(argv: list[str] | None = None) -> int:
    """Train on the same batches both ways, and print the samples a second of each."""
    arguments, more = _parser().parse_known_args(argv)
    spec = find_spec("strategy")
    changes = {"encoder": arguments.geometry, "emotion_model": arguments.geometry}
    config, training = configure(spec, "tiny", {**changes, **settings(arguments.set), **flags(more)})
    recipe = StrategyRecipe(config, training, arguments.data)
    count = arguments.batches * training["batch"]
    recipe.samples = (recipe.samples[0][:count], recipe.samples[1][:1])
    frozen_inferences = recipe.frozen_inferences()
    with tempfile.TemporaryDirectory(prefix="slipway-") as folder:
        with Store(Path(folder)) as store:
            read_s = _seconds(lambda: [fill(store, each) for each in frozen_inferences])
        with Store(Path(folder)) as store:
            fetched_s = _seconds(lambda: _fetch(store, frozen_inferences))
        recipe.training = {**training, "store": folder}
        step_s = _steps_s(recipe, arguments.batches)
    samples = len(recipe.samples[0])
    rows = [
        ("frozen models in the loop", f"{samples / (read_s + step_s):.1f}"),
        ("from the store", f"{samples / (fetched_s + step_s):.1f}"),
        ("ratio", f"{(read_s + step_s) / (fetched_s + step_s):.1f}"),
    ]
    print(table([f"{arguments.geometry}, batch {training['batch']}", "samples/s"], rows))
    return 0


def _fetch(store: Store, frozen_inferences: Sequence[FrozenInference]) -> None:
    """Read the outputs from the store, as training does once before its first epoch."""
    for each in frozen_inferences:
        store.namespace(each.namespace, each.identity).require(each.texts, "read them first")


def _steps_s(recipe: StrategyRecipe, batches: int) -> float:
    """Seconds of `batches` training steps of the trained part alone."""
    module = find_spec("strategy").interface.build(recipe.config)
    with_loss = recipe.module_with_loss(module).train()
    optimiser = torch.optim.AdamW(with_loss.parameters(), recipe.training["lr"])
    loader: Any = DataLoader(recipe.datasets(1)[0], recipe.training["batch"], collate_fn=recipe.collate)
    rows = list(itertools.islice(itertools.cycle(loader), batches + 1))

    def step(batch: Any) -> None:
        optimiser.zero_grad()
        with_loss(**batch)["loss"].backward()
        optimiser.step()

    step(rows[0])  # the first one allocates
    started = time.perf_counter()
    for batch in rows[1:]:
        step(batch)
    return time.perf_counter() - started


def _seconds(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def _parser() -> Any:
    result = parser(
        "benchmarks.strategy.store",
        __doc__.partition(":")[0] + ".",
        "--data dialogues.jsonl",
        "--data dialogues.jsonl --geometry seeded:tiny --batches 20",
    )
    result.add_argument("--data", type=Path, help="the model's data (default: synthetic)")
    result.add_argument(
        "--geometry", default="seeded:base", help="geometry of encoder and classifier (default: %(default)s)"
    )
    result.add_argument("--batches", type=int, default=4, help="batches of each way (default: %(default)s)")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change one setting; repeat for several (default: none)",
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
