"""Let models read their data once: python -m training.precompute MODEL

With --store, the frozen parts of a model read its training data into a store. With --out, a trained model embeds a
collection into a folder that `runtimes.search.collection` opens.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtimes.cache.store import Store, buckets
from runtimes.errors import InputError
from runtimes.host.cli import command, flags, parser, settings, table
from runtimes.search.collection import DTYPES
from runtimes.search.papers import SIZES
from training.embed_dataset import Job, Work, collect, collect_with_ray
from training.loop import is_first_process
from training.run import configure
from training.spec import FrozenInference, find_spec

PADDED_SIZE = 4096  # tokens of a batch, padding included
EVERY_TEXT = slice(None)


@command
def main(argv: list[str] | None = None) -> int:
    """Do what is not done yet; a run that was interrupted goes on where it stopped."""
    arguments, more = _parser().parse_known_args(argv)
    if (arguments.store is None) == (arguments.out is None):
        raise InputError("expected --store FOLDER for frozen parts or --out FOLDER for a collection, and one of them")
    if arguments.store:
        fill_store(arguments, {**settings(arguments.set), **flags(more)})
    elif more or arguments.set:
        raise InputError(f"--out: expected no settings, for the checkpoint has them; found {more or arguments.set}")
    else:
        make_collection(arguments)
    return 0


def fill_store(arguments: Any, changes: dict[str, str]) -> None:
    """The frozen parts have read the data; batch by batch it is in the store."""
    spec = find_spec(arguments.model)
    config, training = configure(spec, arguments.preset, changes)
    recipe = spec.recipe()(config, training, arguments.data)
    for line in recipe.summary():
        print(f"{spec.name}: {line}", file=sys.stderr)
    frozen_inferences = recipe.frozen_inferences()
    if not frozen_inferences:
        raise InputError(f"expected a model with frozen parts that read texts, found {spec.name}, which has none")
    padded_size = arguments.padded_size or recipe.training.get("padded_size", PADDED_SIZE)
    rows = []
    with Store(arguments.store) as store:
        for reading in frozen_inferences:
            started = time.perf_counter()
            read = fill(store, reading, padded_size, _own_share())
            seconds = time.perf_counter() - started
            rate = f"{read / seconds:.1f}" if read else "-"
            rows.append((reading.namespace, len(set(reading.texts)), read, f"{seconds:.1f}", rate))
    print(table(["shelf", "texts", "read now", "seconds", "texts/s"], rows))


def make_collection(arguments: Any) -> None:
    """The collections asked for are finished; with `--size all`, each size in a folder of its name."""
    if arguments.data is None or not arguments.data.is_file():
        raise InputError(f"--data: expected the file with the statements, found {arguments.data or 'none'}")
    names = ("model", "data", "dtype", "precision", "device", "padded_size", "shard_rows")
    job = Job(
        **{name: getattr(arguments, name) for name in names},
        checkpoint=arguments.checkpoint or Path("checkpoints") / arguments.model,
        out=arguments.out,
    )
    sizes = list(SIZES) if arguments.size == "all" else [arguments.size]
    rows = []
    for size in sizes:
        out = arguments.out / size if len(sizes) > 1 else arguments.out
        started = time.perf_counter()
        work = Work(replace(job, size=size, out=out))
        shards = collect_with_ray(work, arguments.workers) if arguments.engine == "ray" else collect(work)
        rows.append((out, work.writer.info.rows, shards, f"{time.perf_counter() - started:.1f}"))
    if is_first_process():
        print(table(["collection", "rows", "shards now", "seconds"], rows))


def fill(store: Store, reading: FrozenInference, padded_size: int = PADDED_SIZE, share: slice = EVERY_TEXT) -> int:
    """How many texts were read: those of this share that had no entry. Every batch is kept as soon as it is read."""
    namespace = store.namespace(reading.namespace, reading.identity)
    missing = namespace.missing(list(dict.fromkeys(reading.texts))[share])
    with tqdm(total=len(missing), desc=reading.namespace, disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in buckets(missing, reading.lengths(missing), padded_size):
            namespace.put(batch, reading.run(batch))
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
        "statements --data statements.jsonl --out collections/toy --size toy",
    )
    result.add_argument("model", help="model name")
    result.add_argument("--data", type=Path, help="the model's data (default: synthetic)")
    result.add_argument("--padded-size", type=int, default=0, help="tokens of a batch, padding included")
    store = result.add_argument_group("frozen parts")
    store.add_argument("--store", type=Path, help="folder of the store")
    store.add_argument("--preset", default="tiny", help="size of the model (default: tiny)")
    store.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="change one setting; --NAME VALUE does too"
    )
    own = result.add_argument_group("collections")
    own.add_argument("--out", type=Path, help="folder of the collection")
    own.add_argument("--checkpoint", type=Path, help="folder of the checkpoint (default: checkpoints/MODEL)")
    own.add_argument("--size", default="full", choices=[*SIZES, "all"], help="how many statements (default: full)")
    own.add_argument("--dtype", default="float16", choices=DTYPES, help="of the rows on disk (default: float16)")
    own.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the matrix products")
    own.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="(default: a GPU if any)")
    own.add_argument("--shard-rows", type=int, default=1024, help="rows that are written together (default: 1024)")
    own.add_argument("--engine", default="local", choices=("local", "ray"), help="ray: as a Ray Data job")
    own.add_argument("--workers", type=int, default=2, help="actors of Ray (default: 2)")
    return result


if __name__ == "__main__":
    sys.exit(main())
