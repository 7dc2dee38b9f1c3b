"""Synthetic papers, whose statements also train the tokenizer of a random base."""

from collections.abc import Sequence

import numpy as np

from runtimes.search.papers import Paper, Statement

TOPICS = 16  # words of the synthetic language belong to one of so many topics
WORDS = 12  # in each topic
COMMON = ("let", "be", "a", "of", "the", "then", "is", "for", "every", "such", "that", "and", "if", "with", "in", "$x$")


def flatten(papers: Sequence[Paper]) -> tuple[list[str], np.ndarray]:
    """All statements in order, and the number of the paper of each, int64."""
    texts = [statement.text for paper in papers for statement in paper.statements]
    counts = [len(paper.statements) for paper in papers]
    return texts, np.repeat(np.arange(len(papers)), counts)


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
