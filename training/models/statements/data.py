"""Papers for training and validation, and pairs of statements of the same paper."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from runtimes.errors import InputError
from runtimes.pipelines.statements.papers import Paper, Statement, read_papers

TOPICS = 16  # words of the synthetic language belong to one of so many topics
WORDS = 12  # in each topic
COMMON = ("let", "be", "a", "of", "the", "then", "is", "for", "every", "such", "that", "and", "if", "with", "in", "$x$")


def train_and_valid(data: Path, share: float, seed: int) -> tuple[list[Paper], list[Paper]]:
    """Training and validation papers: *_train.jsonl and *_valid.jsonl of a folder, or one file split by paper.

    Papers are told apart before any is left out: a filter after the split cannot move a paper across it.
    """
    if not data.is_dir():
        return split_by_paper(list(read_papers(data)), share, seed)
    found = {part: sorted(data.glob(f"*{part}.jsonl")) for part in ("train", "valid")}
    for part, paths in found.items():
        if len(paths) != 1:
            raise InputError(f"{data}: expected one file *{part}.jsonl, found {len(paths)}; or give one file to split")
    return list(read_papers(found["train"][0])), list(read_papers(found["valid"][0]))


def split_by_paper(papers: Sequence[Paper], share: float, seed: int) -> tuple[list[Paper], list[Paper]]:
    """(training, validation); about `share` of all papers are held out, whatever they hold."""
    count = max(1, round(share * len(papers)))
    if count >= len(papers):
        raise InputError(f"expected at least two papers to hold one out, found {len(papers)}")
    order = np.random.default_rng(seed).permutation(len(papers))
    held_out = set(order[:count].tolist())
    return (
        [paper for i, paper in enumerate(papers) if i not in held_out],
        [paper for i, paper in enumerate(papers) if i in held_out],
    )


def flatten(papers: Sequence[Paper]) -> tuple[list[str], np.ndarray]:
    """All statements in order, and the number of the paper of each, int64."""
    texts = [statement.text for paper in papers for statement in paper.statements]
    counts = [len(paper.statements) for paper in papers]
    return texts, np.repeat(np.arange(len(papers)), counts)


def draw_pairs(papers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pairs of different rows of the same paper, int64 [pairs, 2], in random order; `papers` gives each row's paper.

    Every row is in one pair; where a paper's rows are odd in number, one of them is in two. A paper with a single
    statement has nobody to be paired with.
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


def synthetic_papers(seed: int, count: int) -> list[Paper]:
    """Made-up papers: each has two topics, from whose words its statements are made."""
    rng = np.random.default_rng(seed)
    syllables = ("ba", "co", "di", "fu", "ge", "lo", "mi", "ra", "se", "tu")
    words = ["".join(syllables[int(digit)] for digit in f"{i:03d}") for i in range(TOPICS * WORDS)]
    topics = np.array(words)[rng.permutation(len(words))].reshape(TOPICS, WORDS)
    papers = []
    for number in range(count):
        own = topics[rng.choice(TOPICS, 2, replace=False)].ravel()
        statements = []
        for _ in range(int(rng.integers(2, 7))):
            length = int(rng.integers(6, 18))
            drawn = np.where(rng.random(length) < 0.8, rng.choice(own, length), rng.choice(COMMON, length))
            statements.append(Statement(type="lemma", text=" ".join(drawn) + "."))
        papers.append(Paper(arxiv_id=f"synthetic/{number}", title=" ".join(own[:3]), statements=tuple(statements)))
    return papers


def write_sample(folder: Path, seed: int) -> list[Path]:
    """Writes 200 synthetic papers to train.jsonl and valid.jsonl, a paper a line; the paths written."""
    parts = dict(zip(("train", "valid"), split_by_paper(synthetic_papers(seed, 200), 0.2, seed), strict=True))
    for part, papers in parts.items():
        rows = [{name: value for name, value in asdict(paper).items() if name != "empty"} for paper in papers]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [folder / f"{part}.jsonl" for part in parts]
