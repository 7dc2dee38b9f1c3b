"""Byte n-grams to be measured against: interpolated modified Kneser-Ney.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling (1998), section 3: three
discounts an order, estimated from the training text; lower orders count the contexts a byte follows, not how often.
"""

from dataclasses import dataclass

import numpy as np

from runtimes.pipelines.hnet.byte_text import BOS, VOCABULARY
from training.models.hnet.data import Corpus


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """One order: discounted shares of n-grams, and the rest of each context for the order below.

    An n-gram is its bytes as one number, the last byte lowest.
    """

    grams: np.ndarray
    shares: np.ndarray
    contexts: np.ndarray
    left: np.ndarray


@dataclass(frozen=True, kw_only=True, eq=False)
class KneserNey:
    """A byte model of order `len(levels)`; every document begins after BOS."""

    levels: tuple[Level, ...]

    @classmethod
    def fit(cls, corpus: Corpus, order: int) -> "KneserNey":
        grams, counts = np.unique(_grams(corpus, order), return_counts=True)
        levels = [_level(grams, counts)]
        for shorter in range(order - 1, 0, -1):
            # A shorter n-gram counts the different bytes before it in the text.
            grams, counts = np.unique(grams & ((1 << 8 * shorter) - 1), return_counts=True)
            levels.append(_level(grams, counts))
        return cls(levels=tuple(reversed(levels)))

    def bits(self, corpus: Corpus) -> np.ndarray:
        """float64 [bytes]: the information of every byte of the corpus, in bits."""
        grams = _grams(corpus, len(self.levels))
        probability = np.full(len(grams), 1 / VOCABULARY)
        for order, level in enumerate(self.levels, 1):
            gram = grams & ((1 << 8 * order) - 1)
            share, left = (
                _look_up(level.grams, level.shares, gram, 0.0),
                _look_up(level.contexts, level.left, gram >> 8, 1.0),
            )
            probability = share + left * probability
        return -np.log2(probability)


def _grams(corpus: Corpus, order: int) -> np.ndarray:
    """uint64 [bytes]: every byte with the order - 1 before it; before a document there are BOS."""
    starts = np.repeat(corpus.offsets[:-1], np.diff(corpus.offsets))
    place = np.arange(len(corpus.text))
    grams = np.zeros(len(corpus.text), np.uint64)
    for back in range(order - 1, -1, -1):
        earlier = place - back
        byte = np.where(earlier >= starts, corpus.text[np.maximum(earlier, 0)], BOS)
        grams = (grams << np.uint64(8)) | byte.astype(np.uint64)
    return grams


def _level(grams: np.ndarray, counts: np.ndarray) -> Level:
    """From sorted n-grams and their counts; D1, D2 and D3+ by the counts of counts, kept within 0..count."""
    ones, twos, threes, fours = (max(1, int((counts == n).sum())) for n in (1, 2, 3, 4))
    ratio = ones / (ones + 2 * twos)
    guess = np.array([0, 1 - 2 * ratio * twos / ones, 2 - 3 * ratio * threes / twos, 3 - 4 * ratio * fours / threes])
    discounts = np.clip(guess, [0, 0.05, 0.05, 0.05], [0, 0.95, 1.95, 2.95])[np.minimum(counts, 3)]
    contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
    totals = np.add.reduceat(counts, first).astype(float)
    sizes = np.diff(np.append(first, len(grams)))
    return Level(
        grams=grams,
        shares=(counts - discounts) / np.repeat(totals, sizes),
        contexts=contexts,
        left=np.add.reduceat(discounts, first) / totals,
    )


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray, otherwise: float) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], otherwise)


def unigram_bits(train: Corpus, judged: Corpus) -> np.ndarray:
    """float64 [bytes]: the information of each byte by its frequency, with add-one smoothing."""
    counts = np.bincount(train.text, minlength=VOCABULARY) + 1
    bits: np.ndarray = -np.log2(counts / counts.sum())[judged.text]
    return bits
