"""The collections of a folder for the web page: ready, broken with a reason, or not computed yet."""

import threading
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os.path import isfile  # no error, as of Path.is_file, where a file may not be looked at
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtimes.errors import ArtifactError, InputError, SlipwayError
from runtimes.search.collection import INFO, METADATA, OLD_EMBEDDINGS, UNFINISHED, Collection, Entry, Paper
from runtimes.search.embedder import Embedder
from runtimes.search.exact import top_k
from runtimes.web.embedding import Job

MARKS = (INFO, UNFINISHED, METADATA, OLD_EMBEDDINGS)  # a folder with one of these is, or was to be, a collection
STATEMENTS_SUFFIX = ".jsonl"


class Source(Protocol):
    """The source of the page: a collection on the disk, or one that was just computed."""

    @property
    def embeddings(self) -> np.ndarray: ...
    @property
    def model(self) -> str: ...
    def __len__(self) -> int: ...
    def entry(self, row: int) -> Entry: ...
    def papers(self) -> list[Paper]: ...


class NotFound(InputError):
    """There is no collection, paper or page of this name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Opened:
    """A source and its papers; `version` changes when the files do."""

    source: Source
    papers: list[Paper]
    version: object = None

    def paper_of(self, row: int) -> int:
        return bisect_right(self.papers, row, key=lambda paper: paper.stop)


class Library:
    """Collections below `folder`, opened at first use; texts are embedded by `open_embedder()`.

    May be used by several threads. A context manager: leaving it closes the model.
    """

    def __init__(self, folder: Path, open_embedder: Callable[[], Embedder], threads: int = 2) -> None:
        self.folder = folder
        self.threads = threads
        self._open_embedder = open_embedder
        self._embedder: Embedder | None = None
        self._opened: dict[str, Opened] = {}
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()  # over the state of the page; never held while something is read from the disk
        self._turns: dict[str, threading.Lock] = {}  # by collection: it is opened once, and blocks no other one
        self._model_lock = threading.Lock()
        self._search_lock = threading.Lock()  # one search uses all threads; two would use twice the memory
        self._exits = ExitStack()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *_: object) -> None:
        for job in self._jobs.values():
            job.stop()
        self._exits.close()

    def describe_all(self) -> list[dict[str, Any]]:
        """All collections: `{"name", "state"}`, and more by state.

        ready: `rows`, `papers`; broken: `reason`; computing: `done`, `total`; uncomputed: `reason`, if it was tried.
        """
        return [self.describe(name) for name in sorted(self._places())]

    def describe(self, name: str) -> dict[str, Any]:
        """The entry of one collection in the list, in any state."""
        job = self._job(name)
        if self._place(name).is_file() and (job is None or not job.succeeded):
            return {"name": name, **(job.progress() if job else {"state": "uncomputed"})}
        try:
            opened = self.open(name)
        except SlipwayError as error:
            return {"name": name, "state": "broken", "reason": str(error)}
        return {"name": name, "state": "ready", "rows": len(opened.source), "papers": len(opened.papers)}

    def open(self, name: str) -> Opened:
        """The collection of this name; a one-line error if there is none, or it is broken or not computed."""
        place = self._place(name)
        with self._turn(name):
            if place.is_file():
                return self._computed(name)
            version = _version(place)
            opened = self._known(name)
            if opened is None or opened.version != version:
                collection = Collection.open(place)
                opened = self._know(name, Opened(source=collection, papers=collection.papers(), version=version))
            return opened

    def compute(self, name: str) -> None:
        """Statements without vectors get them, in memory and in the background; `describe` has the progress."""
        place = self._place(name)
        if not place.is_file():
            raise InputError(f"{name}: expected statements without vectors, found a collection")
        with self._lock:
            job = self._jobs.get(name)
            if job is None or (job.finished and not job.succeeded):
                self._jobs[name] = Job(place, self.embedder)

    def neighbours(self, name: str, row: int, k: int, others: bool) -> list[dict[str, Any]]:
        """The k rows closest to a row, without itself; with `others`, without its paper."""
        opened = self.open(name)
        opened.source.entry(row)  # refuses a row that is not there
        paper = opened.papers[opened.paper_of(row)]
        left_out = set(range(paper.start, paper.stop)) if others else {row}
        query = np.asarray(opened.source.embeddings[row], np.float32)[None]
        hits = self._search(opened, query, k + len(left_out))
        return [hit for hit in hits if hit["row"] not in left_out][:k]

    def search(self, name: str, text: str, k: int) -> list[dict[str, Any]]:
        """The k rows closest to a text; refused where the collection is another model's."""
        opened = self.open(name)
        embedder = self.embedder()
        embedder.refuse_another(name, opened.source.model)
        return self._search(opened, embedder.vectors([text]), k)

    def embedder(self) -> Embedder:
        """The model, opened at the first call; concurrent calls of this method wait until it is open."""
        with self._model_lock:
            if self._embedder is None:
                self._embedder = self._exits.enter_context(self._open_embedder())
            return self._embedder

    def _search(self, opened: Opened, queries: np.ndarray, k: int) -> list[dict[str, Any]]:
        with self._search_lock:
            rows, scores = top_k(opened.source.embeddings, queries, k, threads=self.threads)
        return [
            {"score": round(float(score), 4), **statement(opened, int(row))}
            for row, score in zip(rows[0], scores[0], strict=True)
        ]

    def _computed(self, name: str) -> Opened:
        job = self._job(name)
        if job is None or not job.finished:
            raise InputError(f"{name}: expected a collection, found statements without vectors; compute them first")
        source = job.result()
        opened = self._known(name)
        if opened is None or opened.source is not source:
            opened = self._know(name, Opened(source=source, papers=source.papers()))
        return opened

    def _turn(self, name: str) -> threading.Lock:
        """The lock of an existing collection."""
        with self._lock:
            return self._turns.setdefault(name, threading.Lock())

    def _job(self, name: str) -> Job | None:
        with self._lock:
            return self._jobs.get(name)

    def _known(self, name: str) -> Opened | None:
        with self._lock:
            return self._opened.get(name)

    def _know(self, name: str, opened: Opened) -> Opened:
        with self._lock:
            self._opened[name] = opened
        return opened

    def _place(self, name: str) -> Path:
        places = self._places()
        if name not in places:
            raise NotFound(f"expected a collection of {', '.join(sorted(places)) or 'none'}; found '{name[:80]}'")
        return places[name]

    def _places(self) -> dict[str, Path]:
        """The path of each collection by name. A name of a request is only looked up here, never joined to a path."""
        try:
            paths = sorted(self.folder.iterdir())
        except OSError as error:
            raise ArtifactError(f"{self.folder}: expected a folder of collections, found {error.strerror}") from error
        found = {path.name: path for path in paths if any(isfile(path / mark) for mark in MARKS)}
        files = {path.stem: path for path in paths if path.suffix == STATEMENTS_SUFFIX and isfile(path)}
        return {**files, **found}  # a collection replaces the file it was made from


def statement(opened: Opened, row: int) -> dict[str, Any]:
    """The fields of a row on the page; `paper` is its place in the list of papers."""
    entry = opened.source.entry(row)
    paper = opened.paper_of(row)
    return {
        "row": row, "paper": paper, "arxiv_id": entry.arxiv_id, "title": entry.title, "type": entry.type,
        "text": entry.text,
    }  # fmt: skip


def matching(papers: Sequence[Paper], words: str) -> list[int]:
    """The papers in whose title or id every word stands, in any case."""
    wanted = words.casefold().split()
    return [
        number
        for number, paper in enumerate(papers)
        if all(word in f"{paper.title} {paper.arxiv_id}".casefold() for word in wanted)
    ]


def _version(folder: Path) -> object:
    return tuple(
        (path.stat().st_mtime_ns, path.stat().st_size) if isfile(path) else None
        for path in (folder / INFO, folder / METADATA)
    )
