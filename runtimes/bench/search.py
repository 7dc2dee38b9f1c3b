"""Measure exact and approximate search over a synthetic collection: python -m runtimes.bench.search DIR"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.errors import require
from runtimes.host.cli import command, parser
from runtimes.host.progress import progress
from runtimes.search.collection import EMBEDDINGS, Collection, Entry, Info
from runtimes.search.exact import Hits, top_k
from runtimes.search.index import INDEX, Index, build_index
from runtimes.search.writer import Writer

SHARD_ROWS = 8192
PAPER_ROWS = 19  # statements of a paper, on average
QUERIES = 200
THREADS = 2
TEXT = "Let $X$ be a scheme. Then $X$ is quasi-affine if and only if $\\mathcal{O}_X$ is ample. " * 5

Search = Callable[[np.ndarray, int], np.ndarray]  # queries [n, width], k -> rows [n, k]


@command
def main(argv: list[str] | None = None) -> int:
    """Print the times of opening, exact search and each approximate index. The collections stay in DIR."""
    arguments = _parser().parse_args(argv)
    folders = [arguments.folder / f"{arguments.rows}x{arguments.width}_{dtype}" for dtype in arguments.dtype]
    for folder, dtype in zip(folders, [] if arguments.collection else arguments.dtype, strict=False):
        write_synthetic(folder, arguments.rows, arguments.width, dtype)
    if arguments.approximate:
        collection = Collection.open(arguments.collection or folders[0])
        rows = _approximate_rows(collection, arguments.approximate == "all")
        _print_rows(["index", "build s", "MB", "p50 ms", "recall@10"], rows)
    else:
        rows = chain.from_iterable(_exact_rows(folder, arguments.rounds) for folder in folders)
        _print_rows(["dtype", "GB", "open s", "page cache", "queries", "p50 s"], rows)
    return 0


def _print_rows(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table in Markdown, row by row, since an index may take an hour."""
    for row in chain([header, ["---"] * len(header)], rows):
        print("|", " | ".join(map(str, row)), "|", flush=True)


def write_synthetic(folder: Path, rows: int, width: int, dtype: str) -> None:
    """The folder has a collection whose rows are near those of their paper, and papers near one of 200 topics."""
    info = Info(
        rows=rows, width=width, dtype=dtype, model="0" * 64, base={"source": "synthetic", "sha256": "0" * 64},
        pooling="last", max_tokens=256, size=str(rows), data="0" * 64,
    )  # fmt: skip
    writer = Writer.reserve(folder, info, _entries(rows))
    topics = np.random.default_rng(0).standard_normal((200, width), np.float32)
    for start, stop in progress(writer.missing(SHARD_ROWS), folder.name):
        writer.write(start, _clustered(topics, start, stop))
    writer.finish()


def _clustered(topics: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Cosines of about .8 within a paper and .4 within a topic; a row does not depend on its shard."""
    first = start // PAPER_ROWS
    papers = [_paper(topics, paper) for paper in range(first, -(-stop // PAPER_ROWS))]
    rows = np.concatenate(papers)[start - first * PAPER_ROWS :][: stop - start]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _paper(topics: np.ndarray, paper: int) -> np.ndarray:
    rng = np.random.default_rng(paper)
    centre = topics[rng.integers(len(topics))] + rng.standard_normal(topics.shape[1], np.float32)
    return centre + 0.7 * rng.standard_normal((PAPER_ROWS, topics.shape[1]), np.float32)


def _entries(rows: int) -> Iterator[Entry]:
    for row in range(rows):
        paper = row // PAPER_ROWS
        yield Entry(paper=paper, arxiv_id=f"synthetic/{paper}", title=f"Paper {paper}", type="lemma", text=TEXT)


def _exact_rows(folder: Path, rounds: int) -> Iterator[tuple[object, ...]]:
    started = time.perf_counter()
    collection = Collection.open(folder)
    open_s = time.perf_counter() - started
    known = np.asarray(collection.embeddings[:: max(1, len(collection) // 100)], np.float32)
    rng = np.random.default_rng(3)
    queries = known + 0.01 * rng.standard_normal(known.shape, np.float32)
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    size = f"{collection.info.tensor['data_offsets'][1] / 1e9:.2f}"
    for cache, count in (("cold", 1), ("warm", 1), ("warm", 8)):
        latencies_s = []
        for i in range(rounds):
            if cache == "cold":
                collection = _uncached(collection)
            batch = queries[i * count % 64 :][:count]
            started = time.perf_counter()
            top_k(collection.embeddings, batch, 10, threads=THREADS)
            latencies_s.append(time.perf_counter() - started)
        yield (collection.info.dtype, size, f"{open_s:.3f}", cache, count, f"{statistics.median(latencies_s):.3f}")


def _uncached(collection: Collection) -> Collection:
    """The collection opened again, with none of its rows in the page cache."""
    path = collection.folder / EMBEDDINGS
    collection.embeddings._mmap.close()  # type: ignore[attr-defined]  # the kernel keeps mapped pages
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Collection.open(collection.folder)


def _approximate_rows(collection: Collection, others: bool) -> Iterator[tuple[object, ...]]:
    embeddings = collection.embeddings
    chosen = np.random.default_rng(4).choice(len(collection), QUERIES, replace=False)
    noise = np.random.default_rng(5).standard_normal((QUERIES, embeddings.shape[1]), np.float32)
    queries = np.asarray(embeddings[chosen], np.float32) + 0.3 * noise / np.sqrt(embeddings.shape[1])
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    exact = top_k(embeddings, queries, 10, threads=THREADS)
    yield (
        "exact",
        "0",
        f"{embeddings.nbytes / 1e6:.0f}",
        *_figures(lambda q, k: top_k(embeddings, q, k).rows, queries, exact),
    )
    for name, build in {"runtimes.search.index": lambda _: _ours(collection), **(OTHERS if others else {})}.items():
        started = time.perf_counter()
        search, index_bytes = build(embeddings)
        build_s = time.perf_counter() - started
        yield (name, f"{build_s:.1f}", f"{index_bytes / 1e6:.0f}", *_figures(search, queries, exact))
        if name in OTHERS:
            yield (f"{name}, 40 rescored", "", "", *_figures(_rescored(search, embeddings), queries, exact))


def _figures(search: Search, queries: np.ndarray, exact: Hits) -> tuple[str, str]:
    """Median milliseconds of one query, and the share of the exact ten that it finds."""
    latencies_s, found = [], 0
    for query, rows in zip(queries, exact.rows, strict=True):
        started = time.perf_counter()
        answer = search(query[None], 10)
        latencies_s.append(time.perf_counter() - started)
        found += len(np.intersect1d(answer[0], rows))
    return f"{1000 * statistics.median(latencies_s):.2f}", f"{found / exact.rows.size:.3f}"


def _rescored(search: Search, embeddings: np.ndarray) -> Search:
    def rescored(query: np.ndarray, k: int) -> np.ndarray:
        rows = np.sort(search(query, 4 * k)[0])
        return rows[top_k(embeddings[rows], query, k, threads=1).rows]

    return rescored


def _faiss(description: str, setting: str, value: int) -> Callable[[np.ndarray], tuple[Search, int]]:
    def build(embeddings: np.ndarray) -> tuple[Search, int]:
        faiss = require("faiss", extra="search")
        faiss.omp_set_num_threads(THREADS)
        index = faiss.index_factory(embeddings.shape[1], description, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            sample = np.random.default_rng(6).choice(len(embeddings), min(len(embeddings), 65_536), replace=False)
            index.train(np.asarray(embeddings[np.sort(sample)], np.float32))
        for start in range(0, len(embeddings), SHARD_ROWS):
            index.add(np.asarray(embeddings[start : start + SHARD_ROWS], np.float32))
        faiss.ParameterSpace().set_index_parameter(index, setting, value)
        return lambda queries, k: index.search(queries, k)[1], len(faiss.serialize_index(index))

    return build


def _usearch(dtype: str, connectivity: int, search: int) -> Callable[[np.ndarray], tuple[Search, int]]:
    def build(embeddings: np.ndarray) -> tuple[Search, int]:
        usearch: Any = require("usearch.index", extra="search-bench")
        index = usearch.Index(
            ndim=embeddings.shape[1], metric="cos", dtype=dtype, connectivity=connectivity, expansion_search=search
        )
        for start in range(0, len(embeddings), SHARD_ROWS):
            block = np.asarray(embeddings[start : start + SHARD_ROWS], np.float32)
            index.add(np.arange(start, start + len(block)), block, threads=THREADS)
        return lambda queries, k: index.search(queries, k).keys.reshape(len(queries), -1), index.serialized_length

    return build


def _ours(collection: Collection) -> tuple[Search, int]:
    build_index(collection, threads=THREADS)
    index = Index(collection)
    return lambda queries, k: index.top_k(queries, k, threads=THREADS).rows, (collection.folder / INDEX).stat().st_size


OTHERS = {
    "faiss IVF1024,SQ8 nprobe 16": _faiss("IVF1024,SQ8", "nprobe", 16),
    "faiss HNSW16,SQ8 ef 64": _faiss("HNSW16_SQ8", "efSearch", 64),
    "faiss HNSW32,SQfp16 ef 256": _faiss("HNSW32_SQfp16", "efSearch", 256),
    "usearch f16 M 16 ef 64": _usearch("f16", 16, 64),
    "usearch f16 M 32 ef 256": _usearch("f16", 32, 256),
    "usearch i8 M 16 ef 64": _usearch("i8", 16, 64),
}


def _parser() -> Any:
    result = parser(
        "runtimes.bench.search",
        __doc__.partition(":")[0] + ".",
        "bench --rows 500000",
        "bench --rows 100000 --dtype float16 --approximate all",
    )
    result.add_argument("folder", type=Path, metavar="DIR", help="folder of the synthetic collections, which are kept")
    result.add_argument("--rows", type=int, default=500_000, help="rows of a collection (default: %(default)s)")
    result.add_argument("--width", type=int, default=2048, help="numbers of a row (default: %(default)s)")
    result.add_argument(
        "--dtype",
        nargs="+",
        default=["float16", "float32"],
        choices=["float16", "float32"],
        help="dtypes of the rows (default: float16 float32)",
    )
    result.add_argument("--rounds", type=int, default=7, help="searches of each kind (default: %(default)s)")
    result.add_argument(
        "--approximate", choices=["ours", "all"], help="measure these indexes instead (default: exact search)"
    )
    result.add_argument(
        "--collection", type=Path, help="index this collection instead of a synthetic one (default: none)"
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
