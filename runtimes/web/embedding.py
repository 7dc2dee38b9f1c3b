"""Statements of a file are embedded in the background: in memory, batch by batch, with progress."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import EngineError, InputError, SlipwayError, one_line
from runtimes.search.collection import Entry, Paper, read_entries
from runtimes.search.embedder import Embedder

BATCH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed:
    """A collection in memory. `embeddings` is float16 [rows, width]."""

    model: str
    embeddings: np.ndarray
    entries: list[Entry]

    def __len__(self) -> int:
        return len(self.entries)

    def entry(self, row: int) -> Entry:
        if not 0 <= row < len(self):
            raise InputError(f"expected a row from 0 to {len(self) - 1}, found {row}")
        return self.entries[row]

    def papers(self) -> list[Paper]:
        return list(_papers(self.entries))


class Job:
    """Reads and embeds a file in a thread of its own."""

    def __init__(self, path: Path, embedder: Callable[[], Embedder]) -> None:
        self._path = path
        self._embedder = embedder
        self._done = self._total = 0
        self._computed: Computed | None = None
        self._error: SlipwayError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"embed {path.name}", daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        return self.succeeded or self._error is not None

    @property
    def succeeded(self) -> bool:
        return self._computed is not None

    def progress(self) -> dict[str, Any]:
        """The progress of a job that has not succeeded."""
        if self._error:
            return {"state": "uncomputed", "reason": str(self._error)}
        return {"state": "computing", "done": self._done, "total": self._total}

    def result(self) -> Computed:
        """The computed collection; raises the error that ended the job, if one did."""
        if self._error:
            raise self._error
        if self._computed is None:
            raise EngineError(f"{self._path.name}: expected computed vectors, found unfinished ones")
        return self._computed

    def stop(self) -> None:
        """Stopped and joined."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._computed = self._compute()
        except SlipwayError as error:
            self._error = error
        except (OSError, MemoryError) as error:
            self._error = EngineError(f"{self._path.name}: {one_line(error)}")
        finally:
            if not self.finished:  # no end of the thread may leave the job unfinished
                self._error = EngineError(f"{self._path.name}: the computation broke off; see the server's output")

    def _compute(self) -> Computed:
        embedder = self._embedder()
        entries = list(read_entries(self._path))
        if not entries:
            raise InputError(f"{self._path.name}: expected at least one statement, found none")
        self._total = len(entries)
        order = sorted(range(len(entries)), key=lambda row: len(entries[row].text))  # like lengths: little padding
        embeddings = np.empty((len(entries), 0), np.float16)
        for start in range(0, len(order), BATCH):
            if self._stopped.is_set():
                raise EngineError(f"{self._path.name}: the computation was stopped")
            rows = order[start : start + BATCH]
            vectors = embedder.vectors([entries[row].text for row in rows])
            if not embeddings.size:
                embeddings = np.empty((len(entries), vectors.shape[1]), np.float16)
            embeddings[rows] = vectors
            self._done += len(rows)
        return Computed(model=embedder.model, embeddings=embeddings, entries=entries)


def _papers(entries: list[Entry]) -> Iterator[Paper]:
    start = 0
    for row in range(1, len(entries) + 1):
        if row == len(entries) or entries[row].paper != entries[start].paper:
            yield Paper(arxiv_id=entries[start].arxiv_id, title=entries[start].title, start=start, stop=row)
            start = row
