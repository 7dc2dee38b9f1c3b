"""Outputs of frozen models by content: memory over LMDB, so that a model never reads the same text twice.

A store is a folder of namespaces, one for each frozen model. A key is the digest of the namespace's identity (digest of
the model, its tokenizer, its longest input) and the exact text, so that training and serving share entries.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from runtimes.artifact import read_json, sha256_json, write_json
from runtimes.errors import ArtifactError, one_line, require

MEMORY_ENTRIES = 50_000
MAP_BYTES = 1 << 36  # address space, not disk: the file grows with its entries
MANIFEST = "store.json"
FORMAT = "slipway.store/1"

Identity = Mapping[str, Any]
T = TypeVar("T")


class Store:
    """Arrays by content: the newest `memory_entries` in memory, all of them in `folder` where one is given.

    A context manager. Many processes may read a folder while one writes.
    """

    def __init__(self, folder: Path | None = None, *, memory_entries: int = MEMORY_ENTRIES) -> None:
        self.folder = folder
        self.memory_entries = memory_entries
        self._memory: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._environment: Any = None

    def __enter__(self) -> "Store":
        if self.folder:
            lmdb = require("lmdb", extra="store")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._environment = lmdb.open(str(self.folder), map_size=MAP_BYTES)
            except (OSError, lmdb.Error) as error:
                raise ArtifactError(f"expected a store at {self.folder}, found {one_line(error)}") from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._environment is not None:
            self._environment.close()
        self._environment = None

    def namespace(self, name: str, identity: Identity) -> "Namespace":
        """The entries of one frozen model; `ArtifactError` if the namespace of this name is another model's."""
        if self.folder and not self._has_namespace(self.folder / MANIFEST, name, identity):
            with self._one_writer():
                self._add_namespace(self.folder / MANIFEST, name, identity)
        return Namespace(self, name, identity)

    def _one_writer(self) -> AbstractContextManager[Any]:
        """Inside, no other process or thread that has the folder open adds a namespace or an entry."""
        return nullcontext() if self._environment is None else self._environment.begin(write=True)

    def _has_namespace(self, path: Path, name: str, identity: Identity) -> bool:
        namespaces = _namespaces(path)
        if name in namespaces:
            _refuse_another(path, name, namespaces[name], identity)
        return name in namespaces

    def _add_namespace(self, path: Path, name: str, identity: Identity) -> None:
        if not self._has_namespace(path, name, identity):  # another process may have added it
            write_json(path, {"format": FORMAT, "shelves": {**_namespaces(path), name: dict(identity)}})

    def read(self, keys: Sequence[bytes]) -> list[np.ndarray | None]:
        """The entry of each key, or None."""
        with self._lock:
            found = [self._remembered(key) for key in keys]
        if self._environment is not None and any(entry is None for entry in found):
            with self._environment.begin(buffers=True) as transaction:
                for i, key in enumerate(keys):
                    if found[i] is None and (data := transaction.get(key)) is not None:
                        found[i] = _array(bytes(data))
            self._remember((key, entry) for key, entry in zip(keys, found, strict=True) if entry is not None)
        return found

    def write(self, entries: Mapping[bytes, np.ndarray]) -> None:
        """Keep entries, all or none; `ArtifactError` if the disk refuses."""
        if self._environment is not None:
            lmdb = require("lmdb", extra="store")
            try:
                with self._environment.begin(write=True) as transaction:
                    for key, entry in entries.items():
                        transaction.put(key, _bytes(entry))
            except lmdb.Error as error:
                raise ArtifactError(f"expected to write to the store {self.folder}, found {one_line(error)}") from error
        self._remember(entries.items())

    def _remembered(self, key: bytes) -> np.ndarray | None:
        entry = self._memory.get(key)
        if entry is not None:
            self._memory.move_to_end(key)
        return entry

    def _remember(self, entries: Iterable[tuple[bytes, np.ndarray]]) -> None:
        with self._lock:
            for key, entry in entries:
                self._memory[key] = entry
                self._memory.move_to_end(key)
            while len(self._memory) > self.memory_entries:
                self._memory.popitem(last=False)


class Namespace:
    """The entries of one frozen model in a store."""

    def __init__(self, store: Store, name: str, identity: Identity) -> None:
        self.store = store
        self.name = name
        self._prefix = bytes.fromhex(sha256_json({"shelf": name, **identity}))

    def key(self, text: str) -> bytes:
        return hashlib.sha256(self._prefix + text.encode()).digest()

    def get(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """The output of the model for each text, or None where it is not stored."""
        return self.store.read([self.key(text) for text in texts])

    def put(self, texts: Sequence[str], entries: Sequence[np.ndarray]) -> None:
        self.store.write({self.key(text): entry for text, entry in zip(texts, entries, strict=True)})

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The distinct texts without an entry, in order."""
        distinct = list(dict.fromkeys(texts))
        return [text for text, entry in zip(distinct, self.get(distinct), strict=True) if entry is None]

    def complete(
        self, texts: Sequence[str], compute: Callable[[Sequence[str]], Sequence[np.ndarray]]
    ) -> list[np.ndarray]:
        """The output of the model for each text; `compute` is called once, with the distinct texts that are missing."""
        found = self.get(texts)
        if any(entry is None for entry in found):
            absent = list(dict.fromkeys(text for text, entry in zip(texts, found, strict=True) if entry is None))
            answers = dict(zip(absent, compute(absent), strict=True))
            self.put(absent, list(answers.values()))
            return [answers[text] if entry is None else entry for text, entry in zip(texts, found, strict=True)]
        return [entry for entry in found if entry is not None]

    def require(self, texts: Sequence[str], remedy: str) -> list[np.ndarray]:
        """The output of the model for each text; `ArtifactError` with `remedy` if some are not stored."""
        found = [entry for entry in self.get(texts) if entry is not None]
        if len(found) != len(texts):
            place = self.store.folder or "memory"
            raise ArtifactError(
                f"store {place}, namespace {self.name}: expected {len(texts)} texts, found {len(found)} of them; "
                f"{remedy}"
            )
        return found


def buckets(texts: Sequence[T], lengths: Sequence[int], padded_size: int) -> Iterator[list[T]]:
    """Texts, or their numbers, in batches of like length, longest first.

    A batch has at most `padded_size` tokens once it is padded, unless a single text has more.
    """
    order = sorted(range(len(texts)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        rows = max(1, padded_size // max(1, lengths[order[start]]))
        yield [texts[i] for i in order[start : start + rows]]
        start += rows


def _namespaces(path: Path) -> dict[str, Any]:
    """The identities of the namespaces by name; `ArtifactError` for another format."""
    known: dict[str, Any] = read_json(path) if path.is_file() else {"format": FORMAT, "shelves": {}}
    if known.get("format") != FORMAT:
        raise ArtifactError(f"{path}: expected format {FORMAT}; precompute into another folder")
    namespaces: dict[str, Any] = known["shelves"]
    return namespaces


def _refuse_another(path: Path, name: str, found: Identity, identity: Identity) -> None:
    for key in sorted(found.keys() | identity.keys()):
        if found.get(key) != identity.get(key):
            raise ArtifactError(
                f"{path}: namespace '{name}' holds another model's entries: expected {key} "
                f"{str(identity.get(key))[:16]}, found {str(found.get(key))[:16]}; give another folder"
            )


def _bytes(entry: np.ndarray) -> bytes:
    """Dtype and shape in one line of text, then the numbers."""
    shape = ",".join(map(str, entry.shape))
    return f"{entry.dtype.str} {shape}\n".encode() + np.ascontiguousarray(entry).tobytes()


def _array(data: bytes) -> np.ndarray:
    head, _, body = data.partition(b"\n")
    dtype, _, shape = head.decode().partition(" ")
    return np.frombuffer(body, dtype).reshape([int(size) for size in shape.split(",") if size])
