"""LanguageModel: the decoder inside a model, for engines that run whole language models instead of traced programs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from runtimes.errors import InputError, require

if TYPE_CHECKING:
    from torch import nn

Task = Literal["generate", "embed"]
SETTINGS = "tokenizer_config.json"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class NotADecoder(InputError):
    """The model inside a checkpoint is no decoder, so that engines for language models cannot run it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageModel:
    """A causal language model of Hugging Face's in float32, its adapters merged, with its tokenizer and its head.

    tokenizer   a fast tokenizer of Hugging Face's, complete with special tokens and chat template
    window      tokens of a prompt and its answer together
    texts       token ids of real texts of this model, to quantize it on: int64 [tokens] each
    pooling     how states become one vector, for the task `embed`: mean, last or cls
    projection  the linear layer after the pooling, or None
    """

    model: Any
    tokenizer: Any
    task: Task
    window: int
    texts: Sequence[np.ndarray]
    pooling: str = ""
    projection: "nn.Linear | None" = None


def complete_tokenizer(tokenizer_json: bytes, config: Any, source: str, revision: str) -> Any:
    """Hugging Face's tokenizer around the tokenizer.json that the pipelines read.

    Special tokens and chat template are those of `source`; where it has none, the special tokens that the model's
    config names by id. AutoTokenizer alone is not enough: transformers 5.17 takes only the
    vocabulary of a Qwen2 tokenizer.json and adds its own rules.
    """
    tokenizers = require("tokenizers", extra="train")
    from transformers import PreTrainedTokenizerFast

    from training.frozen import fast_tokenizer

    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
    own = None if _has_no_settings(source) else fast_tokenizer(source, revision)
    if own is None:
        ids = {role: getattr(config, f"{role}_id", None) for role in ROLES}
        special = {role: tokenizer.id_to_token(id_) for role, id_ in ids.items() if isinstance(id_, int)}
    else:
        special = {role: own.special_tokens_map.get(role) for role in ROLES}
    given = {role: token for role, token in special.items() if token}
    result = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **given)
    result.chat_template = own.chat_template if own else None
    return result


def _has_no_settings(source: str) -> bool:
    from training.random_init import is_random

    return is_random(source) or (Path(source).is_dir() and not Path(source, SETTINGS).is_file())


def check_vocabulary(source: str, tokenizer: Any, config: Any) -> None:
    """`InputError` if the tokenizer has ids that the model has no row for."""
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise InputError(
            f"{source}: expected a tokenizer with ids below {config.vocab_size}, the model's vocabulary, "
            f"found id {largest}; give the tokenizer that the model was trained with"
        )
