"""Exact search: the k rows of a matrix on the disk that are closest to a query, independent of other queries."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from runtimes.errors import ArtifactError, InputError
from runtimes.search.collection import DTYPES, LENGTH_TOLERANCE, REMEDY

BLOCK_NUMBERS = 1 << 18  # of a block of rows: 1 MiB as float32, which stays in a core's cache
SCORES_NUMBERS = 1 << 27  # of the scores kept at once: 512 MiB
HALF_SCALE = np.float32(2.0**112)  # between the exponents of float16 and float32
SIGN_AND_VALUE = np.int32(-0x70002000)  # 0x8FFFE000: the bits of a float16 after it was shifted
INFINITE_MAGNITUDE = 0x7C00 << 1  # the bits of a float16 without the sign; those of NaN are larger


class Hits(NamedTuple):
    """The closest rows to each query, best first, and among equals by number. `scores` are cosines."""

    rows: np.ndarray  # int64 [queries, k]
    scores: np.ndarray  # float32 [queries, k]


def top_k(embeddings: np.ndarray, queries: np.ndarray, k: int, *, threads: int = 2) -> Hits:
    """The k closest rows to each query (all, if there are fewer), by products summed in float32.

    `embeddings` float16 or float32 [rows, width], `queries` [queries, width], both of rows of length 1: `InputError`
    for a query that is not, `ArtifactError` for a row that holds NaN. A row's score depends on the row and the query
    alone, so that equal rows are equal, and the answer does not change with other queries or the number of threads.
    """
    queries = check_queries(queries, embeddings.shape[1])
    for name, number in (("k", k), ("threads", threads)):
        if number < 1:
            raise InputError(f"expected {name} of at least 1, found {number}")
    at_once = max(1, SCORES_NUMBERS // len(embeddings))
    hits = [
        _largest(scores, k)
        for start in range(0, len(queries), at_once)
        for scores in _all_scores(embeddings, queries[start : start + at_once], threads)
    ]
    return Hits(np.stack([hit.rows for hit in hits]), np.stack([hit.scores for hit in hits]))


def check_queries(queries: np.ndarray, width: int) -> np.ndarray:
    """The queries as float32; `InputError` unless they are [queries, width] with rows of length 1."""
    if queries.ndim != 2 or len(queries) == 0 or queries.shape[1] != width:
        raise InputError(f"expected queries [n, {width}], found {list(queries.shape)}")
    queries = np.ascontiguousarray(queries, np.float32)
    lengths = np.linalg.norm(queries, axis=1)
    if not (np.abs(lengths - 1) <= LENGTH_TOLERANCE).all():  # NaN is wrong too
        raise InputError(f"expected queries of length 1, found {lengths[np.abs(lengths - 1).argmax()]:.4g}")
    return queries


def _all_scores(embeddings: np.ndarray, queries: np.ndarray, threads: int) -> np.ndarray:
    """float32 [queries, rows]; the rows are shared out among the threads in blocks."""
    rows, width = embeddings.shape
    scores = np.empty((len(queries), rows), np.float32)
    block_rows = max(1, BLOCK_NUMBERS // width)
    blocks = [slice(start, min(start + block_rows, rows)) for start in range(0, rows, block_rows)]
    score = {"F16": _score_half, "F32": _score_single}[DTYPES[embeddings.dtype.name]]
    share = -(-len(blocks) // threads)  # neighbours, so that each thread reads the disk in order
    shares = [blocks[start : start + share] for start in range(0, len(blocks), share)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda blocks: score(np.asarray(embeddings), queries, blocks, scores), shares))
    wrong = ~(np.abs(scores) <= (1 + LENGTH_TOLERANCE) ** 2)  # NaN is wrong too
    if wrong.any():
        _refuse(int(wrong.any(axis=0).argmax()))
    return scores


# np.vecdot takes one product after the other, on this thread, so that a row's score does not depend on its neighbours.
# A matrix product would also wake the threads of the BLAS for every block, and on a busy machine wait long for them.
def _score_single(embeddings: np.ndarray, queries: np.ndarray, blocks: list[slice], out: np.ndarray) -> None:
    for block in blocks:
        for query, scores in zip(queries, out, strict=True):
            np.vecdot(embeddings[block], query, out=scores[block])


def _score_half(embeddings: np.ndarray, queries: np.ndarray, blocks: list[slice], out: np.ndarray) -> None:
    """As `_score_single`; the bits of float16 are moved to where float32 has them, which is exact.

    A cast by NumPy takes seven times as long. Moved, NaN becomes a number, so that it is looked for first.
    """
    queries = queries * HALF_SCALE
    space = np.empty((blocks[0].stop - blocks[0].start, embeddings.shape[1]), np.int32)
    for block in blocks:
        halves = embeddings[block]
        magnitudes = np.left_shift(halves.view(np.uint16), 1)
        if magnitudes.max() >= INFINITE_MAGNITUDE:
            _refuse(block.start + int(magnitudes.max(axis=1).argmax()))
        moved = space[: len(halves)]
        np.left_shift(halves.view(np.int16), 13, out=moved, dtype=np.int32)
        np.bitwise_and(moved, SIGN_AND_VALUE, out=moved)
        for query, scores in zip(queries, out, strict=True):
            np.vecdot(moved.view(np.float32), query, out=scores[block])


def _refuse(row: int) -> None:
    raise ArtifactError(f"embeddings, row {row}: expected a row of length 1, found NaN or a longer one; {REMEDY}")


def _largest(scores: np.ndarray, k: int) -> Hits:
    """The k largest scores; of equal ones those with smaller row numbers."""
    k = min(k, len(scores))
    kth = np.partition(scores, -k)[-k]
    above, equal = np.flatnonzero(scores > kth), np.flatnonzero(scores == kth)
    rows = np.concatenate([above, equal[: k - len(above)]])
    rows = rows[np.lexsort((rows, -scores[rows]))]
    return Hits(rows, scores[rows])
