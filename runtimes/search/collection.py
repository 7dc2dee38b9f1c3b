"""Embeddings of a collection of statements, precomputed: one row for each statement, mapped into memory, never copied.

    embeddings.safetensors   one tensor `embeddings` [rows, width], float16 or float32; rows of length 1
    metadata.jsonl           line i describes row i: {"paper", "arxiv_id", "title", "type", "text"}
    info.json                its origin, written last: a folder without it is unfinished

`writer.py` makes such a folder.
"""

import json
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import read_json, sha256_json
from runtimes.errors import ArtifactError, InputError, one_line
from runtimes.search.papers import read_papers

SCHEMA = 1
EMBEDDINGS, METADATA, INFO = "embeddings.safetensors", "metadata.jsonl", "info.json"
UNFINISHED = "unfinished.json"  # the later info.json
OLD_EMBEDDINGS = "embeddings.pt"
DTYPES = {"float16": "F16", "float32": "F32"}
REMEDY = "precompute it: python -m training.precompute MODEL --data FILE --out DIR"
LENGTH_TOLERANCE = 1e-2  # of a row's length from 1; float16 costs 1e-3
SCAN_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Info:
    """The origin of a collection. `model` is the digest of the checkpoint, `data` that of the file with the statements.

    `base` is `{"source", "sha256"}` of the frozen model below the checkpoint; `size` names how much of the data was
    read.
    """

    rows: int
    width: int
    dtype: str
    model: str
    base: Mapping[str, str]
    pooling: str
    max_tokens: int
    size: str
    data: str

    def __post_init__(self) -> None:
        for name in ("rows", "width", "max_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"expected {name} of at least 1, found {value!r}")
        if self.dtype not in DTYPES:
            raise InputError(f"expected dtype {' or '.join(DTYPES)}, found {self.dtype!r}")
        if not isinstance(self.base, Mapping) or self.base.keys() != {"source", "sha256"}:
            raise InputError(f"expected base with 'source' and 'sha256', found {self.base!r}")
        for name in ("model", "pooling", "size", "data"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"expected {name} as text, found {getattr(self, name)!r}")

    @property
    def digest(self) -> str:
        return sha256_json(self.to_json())

    @property
    def tensor(self) -> dict[str, Any]:
        """The entry of `embeddings` in the header of the safetensors file."""
        size = self.rows * self.width * np.dtype(self.dtype).itemsize
        return {"dtype": DTYPES[self.dtype], "shape": [self.rows, self.width], "data_offsets": [0, size]}

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "base": dict(self.base)}

    @classmethod
    def load(cls, path: Path) -> "Info":
        """The info in a file; `ArtifactError` for another schema, missing or unknown fields, or wrong values."""
        data = read_json(path)
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            raise ArtifactError(f"{path}: expected schema {SCHEMA}, found another; {REMEDY}")
        if wrong := data.keys() ^ {field.name for field in fields(cls)}:
            raise ArtifactError(f"{path}: missing or unknown fields: {', '.join(sorted(wrong))}; {REMEDY}")
        try:
            return cls(**data)
        except InputError as error:
            raise ArtifactError(f"{path}: {error}; {REMEDY}") from error


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One line of the metadata. `paper` counts from 0; the rows of a paper are adjacent."""

    paper: int
    arxiv_id: str
    title: str
    type: str
    text: str

    def __post_init__(self) -> None:
        if type(self.paper) is not int:
            raise InputError(f"expected a number 'paper', found {ascii(self.paper)[:80]}")
        for name in ("arxiv_id", "title", "type", "text"):
            if type(getattr(self, name)) is not str:
                raise InputError(f"expected text in '{name}', found {ascii(getattr(self, name))[:80]}")


def read_entries(data: Path, statements: int | None = None) -> Iterator[Entry]:
    """The first statements of a file, or all, with their papers: the rows of a collection."""
    for number, paper in enumerate(read_papers(data, statements)):
        for statement in paper.statements:
            yield Entry(
                paper=number, arxiv_id=paper.arxiv_id, title=paper.title, type=statement.type, text=statement.text
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """The rows [start, stop) of one paper."""

    arxiv_id: str
    title: str
    start: int
    stop: int


class Collection:
    """A finished collection: `embeddings` [rows, width] stays on the disk until a row is read, as do the entries."""

    def __init__(self, folder: Path, info: Info, embeddings: np.ndarray, lines: "Lines") -> None:
        self.folder = folder
        self.info = info
        self.embeddings = embeddings
        self._lines = lines

    def __len__(self) -> int:
        return self.info.rows

    @property
    def model(self) -> str:
        return self.info.model

    @classmethod
    def open(cls, folder: Path) -> "Collection":
        """The collection in a folder; a one-line error for one that is unfinished or damaged.

        No row is read here; a search refuses those that are NaN.
        """
        _refuse_unfinished(folder)
        info = Info.load(folder / INFO)
        embeddings = _map_embeddings(folder / EMBEDDINGS, info)
        lines = Lines(folder / METADATA)
        if len(lines) != info.rows:
            raise ArtifactError(
                f"{folder / METADATA}: expected {info.rows} lines, one for each row, found {len(lines)}; {REMEDY}"
            )
        return cls(folder, info, embeddings, lines)

    def entry(self, row: int) -> Entry:
        """The entry of a row; `InputError` for a row that does not exist, `ArtifactError` for a damaged line."""
        if not 0 <= row < len(self):
            raise InputError(f"expected a row from 0 to {len(self) - 1}, found {row}")
        try:
            return Entry(**json.loads(self._lines[row]))
        except (TypeError, ValueError, InputError) as error:  # fields are missing, not JSON, not UTF-8, of another kind
            raise ArtifactError(f"{self.folder / METADATA}, line {row + 1}: {one_line(error)}; {REMEDY}") from error

    def papers(self) -> list[Paper]:
        """Every paper, in order. Of each only the first line is parsed: the others begin with the same bytes."""
        firsts: list[tuple[int, Entry]] = []
        head = b""
        for row in range(len(self)):
            line = self._lines[row]
            if head and line.startswith(head):
                continue
            entry = self.entry(row)
            if not firsts or firsts[-1][1].paper != entry.paper:
                firsts.append((row, entry))
            head = line[: max(0, line.find(b'"type"'))]
            if b'"paper"' not in head:  # another writer, with another order of keys: every line is parsed
                head = b""
        stops = [*(row for row, _ in firsts[1:]), len(self)]
        return [
            Paper(arxiv_id=entry.arxiv_id, title=entry.title, start=start, stop=stop)
            for (start, entry), stop in zip(firsts, stops, strict=True)
        ]


class Lines:
    """The lines of a file as bytes, by number; the file stays on the disk."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                self._bytes = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except OSError as error:
            raise ArtifactError(f"{path}: expected lines of JSON, found {one_line(error)}; {REMEDY}") from error
        ends = [
            np.flatnonzero(np.frombuffer(self._bytes[start : start + SCAN_BYTES], np.uint8) == ord("\n")) + start + 1
            for start in range(0, size, SCAN_BYTES)
        ]
        self._starts = np.concatenate([np.zeros(1, np.int64), *ends])
        if self._starts[-1] != size:  # the last line has no end
            self._starts = np.append(self._starts, size)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        return self._bytes[self._starts[number] : self._starts[number + 1]]


def _refuse_unfinished(folder: Path) -> None:
    if (folder / INFO).is_file():
        return
    if (folder / UNFINISHED).is_file():
        raise ArtifactError(f"{folder}: expected a finished collection, found one that is not; go on to {REMEDY}")
    if (folder / OLD_EMBEDDINGS).is_file():
        raise InputError(f"{folder}: {OLD_EMBEDDINGS} is a pickle, which is never read; {REMEDY}")
    raise InputError(f"{folder}: expected a collection with {INFO}, found none; {REMEDY}")


def _map_embeddings(path: Path, info: Info) -> np.ndarray:
    """The tensor `embeddings` [rows, width], mapped read-only; `ArtifactError` unless the file agrees with the info."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(header_bytes, size)))
        found = {name: header["embeddings"][name] for name in info.tensor}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: expected a tensor 'embeddings', found {one_line(error)}; {REMEDY}") from error
    if found != info.tensor:
        raise ArtifactError(f"{path}: expected {info.tensor}, found {found}; {REMEDY}")
    start = 8 + header_bytes
    expected_bytes = start + info.tensor["data_offsets"][1]
    if size != expected_bytes:
        raise ArtifactError(f"{path}: expected {expected_bytes} bytes, found {size}; {REMEDY}")
    return np.memmap(path, info.dtype, "r", start, (info.rows, info.width))
