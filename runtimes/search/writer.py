"""Writes a collection, row range by row range, from any number of processes; a run that was killed can be continued.

Until it is finished, the folder holds `unfinished.json` (the later `info.json`) and in `shards/` a record for every
range of rows that is on the disk. A record names the digest of that info, so that two runs cannot mix.
"""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from runtimes.artifact import read_json
from runtimes.errors import ArtifactError, InputError, SlipwayError
from runtimes.host.durable import sync, sync_stream
from runtimes.search.collection import EMBEDDINGS, INFO, LENGTH_TOLERANCE, METADATA, UNFINISHED, Entry, Info

SHARDS = "shards"
PAGE_BYTES = 4096  # rows begin on a page: a row of 2048 float16 is then one page


class Writer:
    """Reserve a folder, write the ranges that are missing, finish."""

    def __init__(self, folder: Path, info: Info) -> None:
        self.folder = folder
        self.info = info
        self._header = _header(info)

    @classmethod
    def reserve(cls, folder: Path, info: Info, entries: Iterable[Entry]) -> "Writer":
        """A writer whose metadata is on the disk and whose rows have their place there.

        Every worker may call this, at once or later: nothing that was written is lost. `ArtifactError` if the folder
        holds the rows of another model or of other data.
        """
        folder.mkdir(parents=True, exist_ok=True)
        writer = cls(folder, info)
        if writer.finished:
            writer._refuse_another(INFO)
            return writer
        writer._announce()
        if not (folder / METADATA).exists():
            _write_durably(folder / METADATA, _metadata_lines(entries, info.rows))
        (folder / SHARDS).mkdir(exist_ok=True)
        descriptor = os.open(folder / EMBEDDINGS, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, writer._header, 0)
            _allocate(descriptor, len(writer._header) + info.tensor["data_offsets"][1])
        finally:
            os.close(descriptor)
        return writer

    @property
    def finished(self) -> bool:
        return (self.folder / INFO).is_file()

    def missing(self, shard_rows: int) -> list[tuple[int, int]]:
        """The ranges [start, stop) with rows that are not on the disk yet, cut at the multiples of `shard_rows`."""
        if self.finished:
            return []
        written = self._written()
        starts = range(0, self.info.rows, shard_rows)
        ranges = ((start, min(start + shard_rows, self.info.rows)) for start in starts)
        return [(start, stop) for start, stop in ranges if not written[start:stop].all()]

    def write(self, start: int, rows: np.ndarray) -> None:
        """Rows start, start + 1, ... are on the disk, with a record. Float [rows, width], each of length 1."""
        stop = start + len(rows)
        if rows.ndim != 2 or rows.shape[1] != self.info.width or not 0 <= start < stop <= self.info.rows:
            expected = f"[n, {self.info.width}] within 0..{self.info.rows}"
            raise InputError(f"expected rows {expected}, found {list(rows.shape)} at {start}")
        lengths = np.linalg.norm(rows.astype(np.float32), axis=1)
        wrong = np.flatnonzero(~(np.abs(lengths - 1) <= LENGTH_TOLERANCE))  # NaN is wrong too
        if wrong.size:
            raise ArtifactError(f"expected rows of length 1, found {lengths[wrong[0]]:.4g} in row {start + wrong[0]}")
        data = np.ascontiguousarray(rows, self.info.dtype)
        # Not through a memory map: a full disk is an error here, and two machines may share the page at a border.
        with (self.folder / EMBEDDINGS).open("r+b") as stream:
            stream.seek(len(self._header) + start * data.strides[0])
            stream.write(data.data)
            sync_stream(stream)
        record = {"info": self.info.digest, "start": start, "stop": stop}
        _write_durably(self.folder / SHARDS / f"{start}-{stop}.json", [json.dumps(record).encode()])

    def finish(self) -> None:
        """The collection is published; `ArtifactError` if a row is missing. Any worker may call this, also twice."""
        if not self.finished:
            try:
                self._refuse_missing()
            except SlipwayError:
                if not self.finished:  # another worker finished first and removes the records
                    raise
            with suppress(FileNotFoundError):  # as above
                os.replace(self.folder / UNFINISHED, self.folder / INFO)
            sync(self.folder)
        self._refuse_another(INFO)
        shutil.rmtree(self.folder / SHARDS, ignore_errors=True)

    def _refuse_missing(self) -> None:
        missing = np.flatnonzero(~self._written())
        if missing.size:
            raise ArtifactError(
                f"{self.folder}: expected {self.info.rows} rows, found {missing.size} missing, "
                f"the first is {missing[0]}; run the same command again to go on"
            )

    def _announce(self) -> None:
        """`unfinished.json` is this run's; it is created once, so that of two runs only the first continues."""
        path = self.folder / UNFINISHED
        if any((self.folder / name).exists() for name in (EMBEDDINGS, METADATA)) and not path.exists():
            raise ArtifactError(f"{self.folder}: expected an empty folder, found files of something else; give another")
        text = json.dumps(self.info.to_json(), indent=1, ensure_ascii=False) + "\n"
        _write_durably(path, [text.encode()], keep=True)
        self._refuse_another(UNFINISHED)

    def _refuse_another(self, name: str) -> None:
        found, expected = Info.load(self.folder / name).to_json(), self.info.to_json()
        for key, value in expected.items():
            if found[key] != value:
                raise ArtifactError(
                    f"{self.folder}: holds the rows of another run: expected {key} {str(value)[:80]}, "
                    f"found {str(found[key])[:80]}; give another folder"
                )

    def _written(self) -> np.ndarray:
        """bool [rows]: which rows are on the disk."""
        written = np.zeros(self.info.rows, bool)
        for path in (self.folder / SHARDS).glob("*.json"):
            record = read_json(path)
            if record["info"] != self.info.digest:
                raise ArtifactError(f"{path}: expected a shard of this run, found another's; give another folder")
            written[record["start"] : record["stop"]] = True
        return written


def _header(info: Info) -> bytes:
    """The head of a safetensors file with one tensor, padded with blanks to whole pages."""
    text = json.dumps({"embeddings": info.tensor}).encode()
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)
    return len(text).to_bytes(8, "little") + text


def _metadata_lines(entries: Iterable[Entry], rows: int) -> Iterator[bytes]:
    count = 0
    for entry in entries:
        count += 1
        try:
            yield json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n"
        except UnicodeEncodeError as error:
            raise InputError(f"entry {count}: expected Unicode text, found half a surrogate pair") from error
    if count != rows:
        raise InputError(f"expected {rows} entries, found {count}")


def _allocate(descriptor: int, size: int) -> None:
    """The file has this size, with its blocks reserved where the system can: a full disk is an error now."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    os.ftruncate(descriptor, size)


def _write_durably(path: Path, pieces: Iterable[bytes], *, keep: bool = False) -> None:
    """The file holds the pieces, also after a power cut, and is never seen half; with `keep`, one that exists stays."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.draft")
    try:
        with draft.open("xb") as stream:
            stream.writelines(pieces)
            sync_stream(stream)
        if keep:
            with suppress(FileExistsError):
                os.link(draft, path)
        else:
            os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)
