"""Embeds whole collections of texts: shards of rows, by one process, by several of torchrun, or as a Ray Data job.

The rows of a shard do not depend on the process that embeds them; with the same `padded_size`, neither do their batches
and their bytes. Shards on the disk are not embedded again.
"""

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from runtimes.artifact import sha256_file, sha256_json
from runtimes.errors import InputError, require
from runtimes.host.progress import progress
from runtimes.search.collection import Info, read_entries
from runtimes.search.papers import SIZES
from runtimes.search.writer import Writer
from training.checkpoint import Checkpoint
from training.recipe import TextEmbedder
from training.spec import all_specs, find_spec

Shard = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingJob:
    """A model, a collection of texts, and the form of the embeddings on the disk.

    size         name of a number of statements: the first so many are embedded
    dtype        of the rows on the disk; `precision` is that of the model's matrix products
    padded_size  tokens of a batch with its padding; 0 derives it from the available memory
    shard_rows   rows that are written together, and so lost together when the process is killed
    """

    model: str
    checkpoint: Path
    data: Path
    out: Path
    size: str = "full"
    dtype: str = "float16"
    precision: str = "fp32"
    device: str = "auto"
    padded_size: int = 0
    shard_rows: int = 1024

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise InputError(f"expected a size of {', '.join(SIZES)}; found '{self.size}'")
        if self.shard_rows < 1 or self.padded_size < 0:
            raise InputError(
                f"expected shards of 1 or more rows and batches of 0 or more tokens, "
                f"found {self.shard_rows}, {self.padded_size}"
            )


class DatasetEmbedder:
    """A job whose folder is reserved and whose texts are read; the model is opened for the first shard."""

    def __init__(self, job: EmbeddingJob) -> None:
        self.job = job
        embedder = find_spec(job.model).training.embedder
        if embedder is None:
            known = [spec.name for spec in all_specs().values() if spec.trained and spec.training.embedder]
            raise InputError(f"expected a model that embeds collections, {', '.join(known)}; found {job.model}")
        self._open = embedder
        self.checkpoint = Checkpoint.load(job.checkpoint)
        entries = list(read_entries(job.data, SIZES[job.size]))
        if not entries:
            raise InputError(f"{job.data}: expected statements, found none")
        self.texts = [entry.text for entry in entries]
        self.writer = Writer.reserve(job.out, self._info(len(entries)), entries)

    @cached_property
    def embedder(self) -> TextEmbedder:
        job = self.job
        return self._open(self.checkpoint, device=job.device, precision=job.precision, padded_size=job.padded_size)

    def missing(self) -> list[Shard]:
        return self.writer.missing(self.job.shard_rows)

    def run(self, start: int, stop: int) -> None:
        """Embed and write rows start..stop."""
        self.writer.write(start, self.embedder.embed(self.texts[start:stop]))

    def _info(self, rows: int) -> Info:
        config = self.checkpoint.config
        (base,) = self.checkpoint.frozen.values()
        return Info(
            rows=rows,
            width=config["width"],
            dtype=self.job.dtype,
            model=self.checkpoint.digest,
            base={"source": base["source"], "sha256": sha256_json(base["tensors"])},
            pooling=config["pooling"],
            max_tokens=config["max_tokens"],
            size=self.job.size,
            data=sha256_file(self.job.data),
        )


def embed_shards(dataset: DatasetEmbedder) -> int:
    """Complete the collection; the number of shards that this process embedded. Under torchrun each has its share."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = [shard for shard in dataset.missing() if shard[0] // dataset.job.shard_rows % world == rank]
    for start, stop in progress(own, f"shards of {dataset.job.out.name}", shown=not rank):
        dataset.run(start, stop)
    if world > 1:
        _wait_for_all()
    dataset.writer.finish()
    return len(own)


def embed_with_ray(dataset: DatasetEmbedder, workers: int) -> int:
    """As `embed_shards`, by so many Ray actors; an actor that dies is restarted and embeds its shard again."""
    if workers < 1:
        raise InputError(f"expected 1 or more workers, found {workers}")
    missing = dataset.missing()
    if missing:
        ray, data = require("ray", extra="ray"), require("ray.data", extra="ray")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        data.DataContext.get_current().enable_progress_bars = False
        shards = data.from_items([{"shard": list(shard)} for shard in missing], override_num_blocks=len(missing))
        gpus = {"num_gpus": 1} if _has_gpu() else {}
        shards.map(_worker(dataset.job), compute=data.ActorPoolStrategy(size=workers), **gpus).materialize()
        ray.shutdown()
    dataset.writer.finish()
    return len(missing)


def _worker(job: EmbeddingJob) -> type:
    """The class of the Ray actors. It holds the job itself: constructor arguments may be lost when an actor dies."""

    class Worker:
        def __init__(self) -> None:
            self.dataset = DatasetEmbedder(job)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            self.dataset.run(*map(int, row["shard"]))
            return row

    return Worker


def _wait_for_all() -> None:
    """Return when every process of torchrun has reached this call."""
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=1))
    distributed.barrier()
    distributed.destroy_process_group()


def _has_gpu() -> bool:
    from torch.cuda import is_available

    return is_available()
