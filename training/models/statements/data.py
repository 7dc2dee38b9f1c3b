"""Papers for training and validation, and pairs of statements of the same paper."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from runtimes.errors import InputError
from runtimes.search.papers import Paper, read_papers
from training.models.statements.synthetic import synthetic_papers


def train_and_valid(data: Path, share: float, seed: int) -> tuple[list[Paper], list[Paper]]:
    """Training and validation papers: *_train.jsonl and *_valid.jsonl of a folder, or one file split by paper.

    Papers are split before any is left out, so that no filter moves a paper across the split.
    """
    if not data.is_dir():
        return split_by_paper(list(read_papers(data)), share, seed)
    found = {part: sorted(data.glob(f"*{part}.jsonl")) for part in ("train", "valid")}
    for part, paths in found.items():
        if len(paths) != 1:
            raise InputError(f"{data}: expected one file *{part}.jsonl, found {len(paths)}; or give one file to split")
    return list(read_papers(found["train"][0])), list(read_papers(found["valid"][0]))


def split_by_paper(papers: Sequence[Paper], share: float, seed: int) -> tuple[list[Paper], list[Paper]]:
    """(training, validation); about `share` of all papers are held out, empty ones included."""
    count = max(1, round(share * len(papers)))
    if count >= len(papers):
        raise InputError(f"expected at least two papers to hold one out, found {len(papers)}")
    order = np.random.default_rng(seed).permutation(len(papers))
    held_out = set(order[:count].tolist())
    return (
        [paper for i, paper in enumerate(papers) if i not in held_out],
        [paper for i, paper in enumerate(papers) if i in held_out],
    )


def draw_pairs(papers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pairs of different rows of the same paper, int64 [pairs, 2], in random order; `papers` gives each row's paper.

    Every row is in one pair; where a paper's rows are odd in number, one of them is in two. A paper with a single
    statement has no pair.
    """
    order = rng.permutation(len(papers))
    order = order[np.argsort(papers[order], kind="stable")]
    starts = np.flatnonzero(np.diff(papers[order], prepend=-1))
    pairs = []
    for rows in np.split(order, starts[1:]):
        if len(rows) > 1:
            if len(rows) % 2:
                rows = np.append(rows, rows[rng.integers(len(rows) - 1)])
            pairs.append(rows.reshape(-1, 2))
    if not pairs:
        raise InputError("expected papers with two or more statements to pair, found none")
    return rng.permutation(np.concatenate(pairs))


def write_sample(folder: Path, seed: int) -> list[Path]:
    """Writes 200 synthetic papers to train.jsonl and valid.jsonl, a paper a line; the paths written."""
    parts = dict(zip(("train", "valid"), split_by_paper(synthetic_papers(seed, 200), 0.2, seed), strict=True))
    for part, papers in parts.items():
        rows = [{name: value for name, value in asdict(paper).items() if name != "empty"} for paper in papers]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [folder / f"{part}.jsonl" for part in parts]
