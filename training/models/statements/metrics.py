"""Retrieval metrics of the statements of a paper among all statements, in blocks, and BM25 as a baseline."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from runtimes.errors import InputError
from training.config import Metrics

BLOCK_SCORES = 1 << 24  # scores that are in memory at once
PRECISION_AT, RECALL_AT = (1, 5, 10), (10, 100, 1000)
BM25_K1, BM25_B = 1.5, 0.75
TERM = re.compile(r"\\?\w+")  # a word, a number or a command of LaTeX

Scores = Callable[[Tensor], Tensor]  # rows [B] -> their scores with all statements [B, N]


def measure(papers: np.ndarray, scores: Scores) -> Metrics:
    """MRR, MAP, P@k and R@k; a query is a statement, relevant are the others of its paper, candidates all others.

    A statement that is alone in its paper is no query, but a candidate.
    """
    papers_N = torch.from_numpy(papers)
    counts_N = torch.bincount(papers_N)[papers_N] - 1
    queries = counts_N.nonzero().flatten()
    if not len(queries):
        raise InputError("expected papers with two or more statements to evaluate on, found none")
    sums: dict[str, float] = defaultdict(float)
    for rows in queries.split(max(1, BLOCK_SCORES // len(papers))):
        scores_BN = scores(rows).clone()
        scores_BN[torch.arange(len(rows)), rows] = -torch.inf
        order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)[:, :-1].cpu()
        relevant_BN = (papers_N[order_BN] == papers_N[rows, None]).float()
        for name, value_B in _by_query(relevant_BN, counts_N[rows].float()).items():
            sums[name] += float(value_B.sum())
    return {name: total / len(queries) for name, total in sums.items()}


def _by_query(relevant_BN: Tensor, counts_B: Tensor) -> dict[str, Tensor]:
    """The metrics of each query, from whether its candidates are relevant, best first."""
    ranks_N = torch.arange(1, relevant_BN.shape[1] + 1)
    hits_BN = relevant_BN.cumsum(1)
    first_B = relevant_BN.argmax(1) + 1
    return {
        "mrr": 1 / first_B,
        "map": (hits_BN / ranks_N * relevant_BN).sum(1) / counts_B,
        **{f"p@{k}": relevant_BN[:, :k].sum(1) / k for k in PRECISION_AT},
        **{f"r@{k}": relevant_BN[:, :k].sum(1) / counts_B for k in RECALL_AT},
    }


def cosine(vectors_ND: Tensor) -> Scores:
    """Scores of unit vectors."""
    return lambda rows: vectors_ND[rows] @ vectors_ND.T


def bm25(texts: Sequence[str]) -> Scores:
    """Okapi BM25 (Robertson and Zaragoza, 2009) of every text for every text as a query."""
    found = [Counter(TERM.findall(text.lower())) for text in texts]
    numbers = {term: i for i, term in enumerate(sorted(set().union(*found)))}
    rows = np.repeat(np.arange(len(found)), [len(counter) for counter in found])
    columns = np.array([numbers[term] for counter in found for term in counter], np.int64)
    counts = np.array([count for counter in found for count in counter.values()], np.float32)
    lengths = np.bincount(rows, counts, len(found))
    appears = np.bincount(columns)
    idf = np.log1p((len(found) - appears + 0.5) / (appears + 0.5))
    saturated = counts + BM25_K1 * (1 - BM25_B + BM25_B * (lengths / lengths.mean())[rows])
    values = (idf[columns] * counts * (BM25_K1 + 1) / saturated).astype(np.float32)
    size = (len(found), len(numbers))
    places = torch.from_numpy(np.stack([rows, columns]))
    weights_NV = torch.sparse_coo_tensor(places, torch.from_numpy(values), size, check_invariants=True).coalesce()
    asked_NV = torch.sparse_coo_tensor(places, torch.from_numpy(counts), size, check_invariants=True).coalesce()

    def scores(queries_B: Tensor) -> Tensor:
        return torch.sparse.mm(weights_NV, asked_NV.index_select(0, queries_B).to_dense().T).T

    return scores
