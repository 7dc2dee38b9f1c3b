"""Build an approximate index of a large collection: python -m runtimes.search.index COLLECTION

The rows are in lists around centres, as bytes; the lists closest to a query are read, and the best of their rows are
scored again, exactly, from the collection. Other indexes were slower or missed more
(benchmarks/search/search_2026-11-21.md).
"""

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import read_manifest, sha256_file, write_manifest
from runtimes.errors import ArtifactError, InputError, one_line, require
from runtimes.host.cli import command, parser
from runtimes.host.progress import progress
from runtimes.search.collection import Collection
from runtimes.search.exact import Hits, check_queries, top_k

INDEX, MANIFEST = "index.faiss", "index.json"
FORMAT = "slipway.index/1"
REMEDY = "build it again: python -m runtimes.search.index COLLECTION"
LIST_ROWS = 256  # in a list, on average
TRAINED_ON = 64  # rows for each centre
LISTS_READ = 16  # at least; and at least one of 32
CANDIDATES = 4  # for each row of the answer, and at least 40
BLOCK_ROWS = 8192


class Index:
    """Rows close to a query without reading them all. `ArtifactError` if it is not an index of this collection.

    Its bytes are verified unless the file has the size and time that it had when they last were; with `verify`, always.
    """

    def __init__(self, collection: Collection, *, verify: bool = False) -> None:
        faiss = require("faiss", extra="search")
        self.collection = collection
        path = collection.folder / INDEX
        found = read_manifest(collection.folder / MANIFEST, FORMAT, REMEDY)
        for name, expected in _made_from(collection).items():
            if found.get(name) != expected:
                raise ArtifactError(f"{path}: expected {name} {expected}, found {found.get(name)}; {REMEDY}")
        if verify or not path.is_file() or found.get("stamp") != _stamp(path):
            _verify(path, found)
        try:
            self._index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as error:
            raise ArtifactError(f"{path}: expected an index, found {one_line(error)}; {REMEDY}") from error
        self._index.nprobe = max(LISTS_READ, self._index.nlist // 32)

    def top_k(self, queries: np.ndarray, k: int, *, threads: int = 2) -> Hits:
        """As `exact.top_k`, but a row may be missed."""
        require("faiss", extra="search").omp_set_num_threads(threads)
        queries = check_queries(queries, self.collection.info.width)
        k = min(k, len(self.collection))
        if k < 1:
            raise InputError(f"expected k of at least 1, found {k}")
        _, candidates = self._index.search(queries, max(CANDIDATES * k, 40))
        hits = [self._rescored(query[None], rows, k, threads) for query, rows in zip(queries, candidates, strict=True)]
        return Hits(np.concatenate([hit.rows for hit in hits]), np.concatenate([hit.scores for hit in hits]))

    def _rescored(self, query: np.ndarray, candidates: np.ndarray, k: int, threads: int) -> Hits:
        rows = np.sort(candidates[candidates >= 0])
        if len(rows) < k:  # the lists that were read held fewer
            return top_k(self.collection.embeddings, query, k, threads=threads)
        hits = top_k(self.collection.embeddings[rows], query, k, threads=1)
        return Hits(rows[hits.rows], hits.scores)


def build_index(collection: Collection, *, threads: int = 2) -> None:
    """Write the index into the collection's folder, its manifest last."""
    faiss = require("faiss", extra="search")
    faiss.omp_set_num_threads(threads)
    rows, width = len(collection), collection.info.width
    lists = max(1, rows // LIST_ROWS)
    index = faiss.index_factory(width, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
    chosen = np.random.default_rng(0).choice(rows, min(rows, TRAINED_ON * lists), replace=False)
    index.train(np.asarray(collection.embeddings[np.sort(chosen)], np.float32))
    for start in progress(range(0, rows, BLOCK_ROWS), "index"):
        index.add(np.asarray(collection.embeddings[start : start + BLOCK_ROWS], np.float32))
    draft = collection.folder / f"{INDEX}.draft"
    (collection.folder / MANIFEST).unlink(missing_ok=True)
    faiss.write_index(index, str(draft))
    draft.replace(collection.folder / INDEX)
    stamp = _stamp(collection.folder / INDEX)
    fields = {**_made_from(collection), "file": sha256_file(collection.folder / INDEX), "stamp": stamp}
    write_manifest(collection.folder / MANIFEST, FORMAT, fields)


def _verify(path: Path, found: dict[str, Any]) -> None:
    """The file is the one of its manifest, which then has its size and time."""
    stamp = _stamp(path) if path.is_file() else None
    if stamp is None or sha256_file(path) != found["file"]:
        raise ArtifactError(f"{path}: expected the index that its manifest names, found another or none; {REMEDY}")
    with suppress(OSError):  # in a read-only folder, the bytes are read again next time
        write_manifest(path.with_name(MANIFEST), FORMAT, {**found, "stamp": stamp})


def _stamp(path: Path) -> list[int]:
    """Size in bytes and time of the last change in ns."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _made_from(collection: Collection) -> dict[str, Any]:
    return {"model": collection.model, "rows": len(collection), "data": collection.info.data}


@command
def main(argv: list[str] | None = None) -> int:
    """Build the index and print its size, or verify the present one."""
    arguments = _parser().parse_args(argv)
    collection = Collection.open(arguments.collection)
    if arguments.verify:
        Index(collection, verify=True)
        print(f"{arguments.collection / INDEX}: unchanged")
        return 0
    started = time.perf_counter()
    build_index(collection, threads=arguments.threads)
    path = arguments.collection / INDEX
    seconds = time.perf_counter() - started
    print(f"{path}: {len(collection)} rows, {path.stat().st_size / 1e6:.0f} MB, {seconds:.1f} s")
    return 0


def _parser() -> Any:
    result = parser(
        "runtimes.search.index",
        __doc__.partition(":")[0] + ".",
        "collections/full",
        "collections/full --threads 8",
    )
    result.add_argument("collection", type=Path, metavar="COLLECTION", help="folder of the collection")
    result.add_argument("--threads", type=int, default=2, help="threads to build with (default: %(default)s)")
    result.add_argument("--verify", action="store_true", help="verify the bytes of the present index, and build none")
    return result


if __name__ == "__main__":
    sys.exit(main())
