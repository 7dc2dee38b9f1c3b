"""Embeds whole collections of statements: shards of rows, by one process, by many of torchrun, or as a Ray Data job.

The rows of a shard are the same whoever embeds them, and where `padded_size` is, so are their batches and their bytes;
what is on the disk is not embedded again.
"""

import logging
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from runtimes.artifact import sha256_file, sha256_json
from runtimes.errors import InputError, require
from runtimes.search.collection import Info, read_entries
from runtimes.search.papers import SIZES
from runtimes.search.writer import Writer
from training.checkpoint import Checkpoint
from training.spec import TextEmbedder, find_spec

Shard = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is embedded by what, and how.

    size         name of the first so many statements
    dtype        of the rows on the disk; `precision` is that of the model's matrix products
    padded_size  tokens of a batch with its padding; 0 finds it from the memory there is
    shard_rows   rows that are written together: what a kill can cost
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


class Work:
    """A job begun: its folder is reserved, its texts are read; the model is there once the first shard needs it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.spec = find_spec(job.model)
        if self.spec.embedder is None:
            raise InputError(f"expected a model that embeds collections, found {job.model}")
        self.checkpoint = Checkpoint.load(job.checkpoint)
        entries = list(read_entries(job.data, SIZES[job.size]))
        if not entries:
            raise InputError(f"{job.data}: expected statements, found none")
        self.texts = [entry.text for entry in entries]
        self.writer = Writer.reserve(job.out, self._info(len(entries)), entries)

    @cached_property
    def embedder(self) -> TextEmbedder:
        assert self.spec.embedder is not None
        job = self.job
        return self.spec.embedder(
            self.checkpoint, device=job.device, precision=job.precision, padded_size=job.padded_size
        )

    def missing(self) -> list[Shard]:
        return self.writer.missing(self.job.shard_rows)

    def run(self, start: int, stop: int) -> None:
        """Rows start..stop are on the disk."""
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


def collect(work: Work) -> int:
    """The collection is finished; how many shards this process embedded. Under torchrun each takes its share."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    own = [shard for shard in work.missing() if shard[0] // work.job.shard_rows % world == rank]
    for start, stop in tqdm(own, desc=work.job.size, disable=rank or not sys.stderr.isatty(), leave=False):
        work.run(start, stop)
    if world > 1:
        _wait_for_all()
    work.writer.finish()
    return len(own)


def collect_with_ray(work: Work, workers: int) -> int:
    """As `collect`, by that many Ray actors; one that dies is started again, and embeds its shard again."""
    if workers < 1:
        raise InputError(f"expected 1 or more workers, found {workers}")
    missing = work.missing()
    if missing:
        ray, data = require("ray", extra="ray"), require("ray.data", extra="ray")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        data.DataContext.get_current().enable_progress_bars = False
        shards = data.from_items([{"shard": list(shard)} for shard in missing], override_num_blocks=len(missing))
        gpus = {"num_gpus": 1} if _has_gpu() else {}
        shards.map(_worker(work.job), compute=data.ActorPoolStrategy(size=workers), **gpus).materialize()
        ray.shutdown()
    work.writer.finish()
    return len(missing)


def _worker(job: Job) -> type:
    """The class of the Ray actors. It holds the job itself: constructor arguments may be lost when an actor dies."""

    class Worker:
        def __init__(self) -> None:
            self.work = Work(job)

        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            self.work.run(*map(int, row["shard"]))
            return row

    return Worker


def _wait_for_all() -> None:
    """Every process of torchrun has come here."""
    from torch import distributed

    distributed.init_process_group("gloo", timeout=timedelta(days=1))
    distributed.barrier()
    distributed.destroy_process_group()


def _has_gpu() -> bool:
    from torch.cuda import is_available

    return is_available()
