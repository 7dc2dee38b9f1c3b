"""Small models with random weights and their tokenizers, for where none can be downloaded.

A source `seeded:GEOMETRY` is made in memory, alike everywhere; the makers write a folder as Hugging Face reads it.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from runtimes.errors import InputError, require
from training.frozen import no_bars_in_a_log

SEEDED = "seeded:"
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the ids of XLM-R
BYTES = 256 + len(SPECIAL)  # the vocabulary of a tokenizer that reads bytes
Model = TypeVar("Model")


def is_seeded(source: str) -> bool:
    """Whether a base is made from a seed rather than read from a folder or a hub."""
    return source.startswith(SEEDED)


def geometry(source: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The sizes behind `seeded:`; `InputError` if there are none of that name."""
    name = source.removeprefix(SEEDED)
    if name not in known:
        raise InputError(f"expected a geometry of {', '.join(known)} behind '{SEEDED}', found '{name}'")
    return dict(known[name])


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """What `make` makes, with the same random weights every time; other random numbers go on as if it had not run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


@lru_cache(maxsize=4)
def byte_tokenizer(*, single: str, pair: str | None = None, words: bool = True) -> bytes:
    """A tokenizer.json that makes every byte of UTF-8 a token and puts the special tokens around as the templates say.

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
    """A byte-level BPE tokenizer of these texts; its special tokens come first, and stand as the templates say."""
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


def write_folder(folder: Path, model: Any, tokenizer: Any) -> None:
    """Config, weights and tokenizer in the files that Hugging Face reads."""
    no_bars_in_a_log()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def add_sizes(parser: argparse.ArgumentParser, made: str, *, width: int) -> None:
    """The options of a maker: folder, width, layers, vocabulary, seed."""
    parser.add_argument("--out", type=Path, required=True, help=f"folder of the {made}")
    parser.add_argument("--width", type=int, default=width, help=f"width of its states (default: {width})")
    parser.add_argument("--layers", type=int, default=1, help="number of layers (default: 1)")
    parser.add_argument("--vocabulary", type=int, default=8000, help="tokens at most (default: 8000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of its weights (default: 0)")
