"""The tokenizer of the base: that of its folder, or one trained on synthetic statements."""

from functools import lru_cache
from typing import Any

from training.frozen import stored_tokenizer
from training.models.statements.base import GEOMETRIES
from training.models.statements.synthetic import flatten, synthetic_papers
from training.random_init import is_random, train_tokenizer

PAD, END = "<pad>", "<end>"


@lru_cache(maxsize=4)
def tokenizer_json(source: str, revision: str) -> bytes:
    """The tokenizer of `source` as a tokenizer.json; that of a random base was trained on synthetic statements."""
    if not is_random(source):
        return stored_tokenizer(source, revision)
    texts, _ = flatten(synthetic_papers(seed=0, count=300))
    return statement_tokenizer(texts, GEOMETRIES["tiny"]["vocab_size"]).to_str().encode()


def statement_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer; it ends every text with END, whose state pooling `last` takes."""
    return train_tokenizer(texts, vocabulary, (PAD, END), single=f"$A {END}")
