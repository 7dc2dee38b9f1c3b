"""Run frozen models over the data once: python -m training.precompute MODEL

With --store, the frozen parts of a model read its training data into a store. With --out, a trained model embeds a
collection into a folder that `runtimes.search.collection` opens.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtimes.cache.store import Store
from runtimes.errors import InputError
from runtimes.host.cli import command, flags, models_argument, parser, settings, table
from runtimes.search.collection import DTYPES
from runtimes.search.papers import SIZES
from training.embed_dataset import DatasetEmbedder, EmbeddingJob, embed_shards, embed_with_ray
from training.frozen_store import PADDED_SIZE, fill
from training.loop import is_first_process
from training.recipe import data_arguments
from training.settings import configure
from training.spec import find_spec


@command
def main(argv: list[str] | None = None) -> int:
    """Compute what is missing in the store or the collection; an interrupted run continues."""
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
    """Run the frozen parts over the data and keep their outputs in the store, batch by batch."""
    spec = find_spec(arguments.model)
    config, training = configure(spec, arguments.preset, changes)
    recipe = spec.training.recipe()(config, training, arguments.data)
    for line in recipe.summary():
        print(f"{spec.name}: {line}", file=sys.stderr)
    inferences = recipe.frozen_inferences()
    if not inferences:
        raise InputError(f"expected a model with frozen parts that read texts, found {spec.name}, which has none")
    padded_size = arguments.padded_size or recipe.training.get("padded_size", PADDED_SIZE)
    rows = []
    with Store(arguments.store) as store:
        for inference in inferences:
            started = time.perf_counter()
            read = fill(store, inference, padded_size, _own_share())
            seconds = time.perf_counter() - started
            rate = f"{read / seconds:.1f}" if read else "-"
            rows.append((inference.namespace, len(set(inference.texts)), read, f"{seconds:.1f}", rate))
    print(table(["namespace", "texts", "read now", "seconds", "texts/s"], rows))


def make_collection(arguments: Any) -> None:
    """Complete the requested collections; with `--size all`, each size in a folder of its name."""
    if arguments.data is None or not arguments.data.is_file():
        raise InputError(f"--data: expected the file with the statements, found {arguments.data or 'none'}")
    names = ("model", "data", "dtype", "precision", "device", "padded_size", "shard_rows")
    job = EmbeddingJob(
        **{name: getattr(arguments, name) for name in names},
        checkpoint=arguments.checkpoint or Path("checkpoints") / arguments.model,
        out=arguments.out,
    )
    sizes = list(SIZES) if arguments.size == "all" else [arguments.size]
    rows = []
    for size in sizes:
        out = arguments.out / size if len(sizes) > 1 else arguments.out
        started = time.perf_counter()
        dataset = DatasetEmbedder(replace(job, size=size, out=out))
        shards = embed_with_ray(dataset, arguments.workers) if arguments.engine == "ray" else embed_shards(dataset)
        rows.append((out, dataset.writer.info.rows, shards, f"{time.perf_counter() - started:.1f}"))
    if is_first_process():
        print(table(["collection", "rows", "shards now", "seconds"], rows))


def _own_share() -> slice:
    """All texts, or under torchrun those of this process, which reads them on its own device."""
    return slice(int(os.environ.get("RANK", "0")), None, int(os.environ.get("WORLD_SIZE", "1")))


def _parser() -> Any:
    result = parser(
        "training.precompute",
        __doc__.partition(":")[0] + ".",
        "strategy --data dialogues.jsonl --store stores/tiny",
        "statements --data statements.jsonl --out collections/toy --size toy",
    )
    models_argument(result, "name of the model", least=1, most=1)
    data_arguments(result)
    result.add_argument(
        "--padded-size", type=int, default=0,
        help=f"tokens of a batch with its padding (default: for frozen parts that of the settings or {PADDED_SIZE}, "
        "for collections from the available memory)",
    )  # fmt: skip
    store = result.add_argument_group("frozen parts")
    store.add_argument("--store", type=Path, help="folder of the store (default: none)")
    _collection_arguments(result.add_argument_group("collections"))
    return result


def _collection_arguments(to: Any) -> None:
    to.add_argument("--out", type=Path, help="folder of the collection (default: none)")
    to.add_argument("--checkpoint", type=Path, help="folder of the checkpoint (default: checkpoints/MODEL)")
    to.add_argument(
        "--size", default="full", choices=[*SIZES, "all"], help="number of statements (default: %(default)s)"
    )
    to.add_argument(
        "--dtype", default="float16", choices=DTYPES, help="dtype of the rows on disk (default: %(default)s)"
    )
    to.add_argument(
        "--precision",
        default="fp32",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the matrix products (default: %(default)s)",
    )
    to.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto is a GPU if any (default: %(default)s)"
    )
    to.add_argument("--shard-rows", type=int, default=1024, help="rows written together (default: %(default)s)")
    to.add_argument(
        "--engine", default="local", choices=("local", "ray"), help="ray: as a Ray Data job (default: %(default)s)"
    )
    to.add_argument("--workers", type=int, default=2, help="actors of --engine ray (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
