"""Exact search finds the rows of a float64 product, in an order that other queries do not change, and refuses NaN."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from runtimes.errors import ArtifactError, InputError
from runtimes.search import exact
from runtimes.search.exact import top_k


def unit_rows(rows: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def by_hand(embeddings: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    scores = queries.astype(np.float64) @ embeddings.astype(np.float64).T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("rows", "width", "k"), [(1, 1, 1), (1000, 33, 10), (300, 2048, 300)])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_closest_rows_are_those_of_a_product_in_float64(
    dtype: str, rows: int, width: int, k: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "BLOCK_NUMBERS", 64 * width)  # several blocks for every thread
    monkeypatch.setattr(exact, "SCORES_NUMBERS", 3 * rows)  # three queries at once
    embeddings, queries = unit_rows(rows, width).astype(dtype), unit_rows(7, width, seed=1)
    hits = top_k(embeddings, queries, k, threads=threads)
    np.testing.assert_array_equal(hits.rows, by_hand(embeddings, queries, k))
    wanted = np.einsum("qkw,qw->qk", embeddings[hits.rows].astype(np.float64), queries.astype(np.float64))
    np.testing.assert_allclose(hits.scores, wanted, rtol=0, atol=1e-6)


def test_k_beyond_the_rows_gives_them_all() -> None:
    assert top_k(unit_rows(3, 4), unit_rows(2, 4), 10).rows.shape == (2, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_equal_rows_come_by_number_wherever_they_lie(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_NUMBERS", 7 * 130)
    embeddings = np.repeat(unit_rows(1, 130), 100, axis=0).astype(dtype)
    query = unit_rows(1, 130, seed=3)
    for k in (1, 10, 99):
        assert top_k(embeddings, query, k).rows.tolist() == [list(range(k))]


def test_an_answer_does_not_change_with_what_else_is_asked() -> None:
    embeddings, queries = unit_rows(5000, 100).astype("float16"), unit_rows(9, 100, seed=1)
    together = top_k(embeddings, queries, 10)
    for i in range(len(queries)):
        alone = top_k(embeddings, queries[i : i + 1], 10, threads=1)
        np.testing.assert_array_equal(alone.rows[0], together.rows[i])
        np.testing.assert_array_equal(alone.scores[0], together.scores[i])


@given(arrays(np.uint16, 64))
@settings(max_examples=200)
def test_moved_bits_are_the_numbers_that_a_cast_gives(bits: np.ndarray) -> None:
    halves = bits.view(np.float16)
    halves = np.where(np.isfinite(halves), halves, np.float16(0))[:, None]
    out = np.empty((1, len(halves)), np.float32)
    exact._score_half(halves, np.ones((1, 1), np.float32), [slice(0, len(halves))], out)
    np.testing.assert_array_equal(out[0], halves[:, 0].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 3.0])
def test_a_row_that_is_no_unit_vector_is_named(dtype: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "BLOCK_NUMBERS", 4 * 16)
    embeddings = unit_rows(50, 4).astype(dtype)
    embeddings[29, 2] = bad
    with pytest.raises(ArtifactError, match="row 29: expected a row of length 1"):
        top_k(embeddings, np.float32([[0.6, 0, 0.8, 0]]), 1)


@pytest.mark.parametrize(("queries", "k", "says"), [
    (unit_rows(1, 5), 1, r"expected queries \[n, 4\]"), (unit_rows(1, 4)[0], 1, "expected queries"),
    (unit_rows(0, 4), 1, "expected queries"), (2 * unit_rows(1, 4), 1, "length 1, found 2"),
    (np.nan * unit_rows(1, 4), 1, "found nan"), (unit_rows(1, 4), 0, "k of at least 1"),
])  # fmt: skip
def test_a_wrong_query_is_refused(queries: np.ndarray, k: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        top_k(unit_rows(3, 4), queries, k)


@pytest.mark.parametrize("threads", [0, -1])
def test_no_threads_are_refused(threads: int) -> None:
    with pytest.raises(InputError, match=f"threads of at least 1, found {threads}"):
        top_k(unit_rows(3, 4), unit_rows(1, 4), 1, threads=threads)
