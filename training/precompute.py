"""Let the frozen parts of a model read its data once, into a store: python -m training.precompute MODEL --store DIR"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtimes.caching import Store, buckets
from runtimes.command import command, flags, parser, settings, table
from runtimes.errors import InputError
from training.run import configure
from training.spec import Reading, find_spec

PADDED_SIZE = 4096  # tokens of a batch, padding included
EVERY_TEXT = slice(None)


@command
def main(argv: list[str] | None = None) -> int:
    """Read what is not in the store yet, batch by batch; a run that was interrupted goes on where it stopped."""
    arguments, more = _parser().parse_known_args(argv)
    spec = find_spec(arguments.model)
    config, training = configure(spec, arguments.preset, {**settings(arguments.set), **flags(more)})
    recipe = spec.recipe()(config, training, arguments.data)
    for line in recipe.summary():
        print(f"{spec.name}: {line}", file=sys.stderr)
    readings = recipe.readings()
    if not readings:
        raise InputError(f"expected a model with frozen parts that read texts, found {spec.name}, which has none")
    rows = []
    with Store(arguments.store) as store:
        for reading in readings:
            started = time.perf_counter()
            read = fill(store, reading, arguments.padded_size, _own_share())
            seconds = time.perf_counter() - started
            rate = f"{read / seconds:.1f}" if read else "-"
            rows.append((reading.shelf, len(set(reading.texts)), read, f"{seconds:.1f}", rate))
    print(table(["shelf", "texts", "read now", "seconds", "texts/s"], rows))
    return 0


def fill(store: Store, reading: Reading, padded_size: int = PADDED_SIZE, share: slice = EVERY_TEXT) -> int:
    """How many texts were read: those of this share that had no entry. Every batch is kept as soon as it is read."""
    shelf = store.shelf(reading.shelf, reading.identity)
    missing = shelf.missing(list(dict.fromkeys(reading.texts))[share])
    with tqdm(total=len(missing), desc=reading.shelf, disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in buckets(missing, reading.lengths(missing), padded_size):
            shelf.put(batch, reading.ask(batch))
            bar.update(len(batch))
    return len(missing)


def _own_share() -> slice:
    """Of the texts: all, or under torchrun those of this process, which reads them on its own device."""
    return slice(int(os.environ.get("RANK", "0")), None, int(os.environ.get("WORLD_SIZE", "1")))


def _parser() -> Any:
    result = parser(
        "training.precompute",
        __doc__.partition(":")[0] + ".",
        "strategy --data dialogues.jsonl --store stores/tiny",
        "strategy --data dialogues.jsonl --store stores/large --preset full --parser sddp",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--preset", default="tiny", help="size of the model (default: tiny)")
    result.add_argument("--data", type=Path, help="the model's data (default: synthetic)")
    result.add_argument("--store", type=Path, required=True, help="folder of the store")
    result.add_argument("--padded-size", type=int, default=PADDED_SIZE, help="tokens of a batch, padding included")
    result.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; --NAME VALUE does too"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
