"""Small models with random weights and their tokenizers, for machines without network access.

A source `seeded:GEOMETRY` is made in memory, with the same weights on every machine.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch

from runtimes.errors import InputError, require

PREFIX = "seeded:"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the ids of XLM-R
BYTES = 256 + len(SPECIAL)  # the vocabulary of a byte tokenizer
Model = TypeVar("Model")


def is_random(source: str) -> bool:
    """Whether the weights of a source are drawn from a seed, and not read from a folder or a hub."""
    return source.startswith(PREFIX)


def geometry(source: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sizes behind `seeded:`; `InputError` for an unknown name."""
    name = source.removeprefix(PREFIX)
    if name not in known:
        raise InputError(f"expected a geometry of {', '.join(known)} behind '{PREFIX}', found '{name}'")
    return dict(known[name])


def with_seed(seed: int, make: Callable[[], Model]) -> Model:
    """The result of `make` with the random numbers of this seed; the generator's state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@lru_cache(maxsize=4)
def byte_tokenizer(*, single: str, pair: str | None = None, words: bool = True) -> bytes:
    """A tokenizer.json with a token for every byte of UTF-8; the templates place the special tokens.

    words  split at words first, which changes no token
    """
    tokenizers = require("tokenizers", extra="train")
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _template(SPECIAL, single, pair)
    return tokenizer.to_str().encode()


def train_tokenizer(
    texts: Sequence[str],
    vocabulary: int,
    special: Sequence[str],
    *,
    single: str,
    pair: str | None = None,
    normalizer: Any = None,
) -> Any:
    """A byte-level BPE tokenizer of these texts; its special tokens come first; the templates place them."""
    tokenizers = require("tokenizers", extra="train")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = _template(special, single, pair)
    return tokenizer


def _template(special: Sequence[str], single: str, pair: str | None) -> Any:
    from tokenizers import processors

    named = [(token, i) for i, token in enumerate(special) if token in single.split()]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=named)
