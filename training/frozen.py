"""Frozen models: read from Hugging Face's files or made with random weights, and never trained.

Shapes: B rows, T tokens.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.artifact import sha256_json
from runtimes.errors import InputError, one_line
from training.digests import array, sha256_tensor
from training.random_init import is_random, with_seed

MASKED = -1e4  # added to masked attention scores; fits float16, and a row that is all masked stays finite
EAGER = {"attn_implementation": "eager"}  # the smallest graph: sdpa is exported with a check for NaN in every layer


class FrozenModule(nn.Module):
    """A model that is never trained and always in eval mode."""

    def train(self, mode: bool = True) -> "FrozenModule":
        return super().train(False)


def pretrained(kind: Any, source: str, revision: str, **options: Any) -> Any:
    """`kind` (a class of transformers with from_pretrained) of a folder or hub id; `InputError` if there is none.

    Also `InputError` if its format needs a package that is not installed.
    """
    no_bars_in_a_log()
    try:
        return kind.from_pretrained(source, revision=revision, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"expected a Hugging Face folder or hub id, found '{source}': {one_line(error)}") from error


def pretrained_model(kind: Any, source: str, revision: str, **options: Any) -> Any:
    """`kind` of a folder or hub id; `InputError` also for a missing weight, which transformers would draw at random.

    Weights are read from safetensors only: without the option transformers also reads pickles.
    """
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = pretrained(kind, source, revision, **options)
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{source}: expected the weights of {type(model).__name__}, found no {missing[0]}{more}")
    return model


def without_pooler(model: Any) -> Any:
    """The model without its pooler, which is not used; a checkpoint without it would make it random."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def load_frozen(kind: Any, source: str, revision: str, *, config: Any = None, seed: int = 0, **options: Any) -> Any:
    """The frozen model `kind` (one of transformers' Auto classes) of `source`, without a pooler.

    A random source has the given config and the weights of the seed.
    """
    if is_random(source):
        model = with_seed(seed, lambda: kind.from_config(config, **options))
    else:
        model = pretrained_model(kind, source, revision, **options)
    return freeze(without_pooler(model))


def freeze(model: Any) -> Any:
    """The model in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


def real_tokens(ids_BT: Tensor, pad: int) -> Tensor:
    """bool [B, T]; the first token is always real, so that a row of padding has a token to attend to."""
    places = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return (ids_BT != pad) | (places == 0)


def inputs(model: nn.Module, ids_BT: Tensor, real_BT: Tensor) -> dict[str, Tensor]:
    """Ids, mask, types and positions; computed here because the model's own computation of them is slow in TensorRT."""
    config: Any = model.config
    dtype = next(model.parameters()).dtype
    mask_B11T = ((~real_BT).to(dtype) * MASKED)[:, None, None, :]
    result = {"input_ids": ids_BT, "attention_mask": mask_B11T}
    if getattr(config, "type_vocab_size", 0):
        result["token_type_ids"] = torch.zeros_like(ids_BT)
    if _counts_behind_padding(config):
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) + config.pad_token_id + 1
        result["position_ids"] = torch.where(real_BT, places_T, config.pad_token_id)
    return result


class FrozenEncoder(FrozenModule):
    """A frozen transformer that reads padded rows of token ids."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def read(self, ids_BT: Tensor) -> tuple[Any, Tensor]:
        """The model's output and the real tokens, bool [B, T]."""
        real_BT = real_tokens(ids_BT, self.model.config.pad_token_id)
        return self.model(**inputs(self.model, ids_BT, real_BT)), real_BT


def longest_input(config: Any) -> int:
    """The largest number of tokens that an encoder of this config has positions for."""
    skipped = config.pad_token_id + 1 if _counts_behind_padding(config) else 0
    return int(config.max_position_embeddings - skipped)


def _counts_behind_padding(config: Any) -> bool:
    """Whether positions begin after the id of the padding token, as RoBERTa's and XLM-R's do."""
    return "roberta" in config.model_type


@lru_cache(maxsize=4)
def stored_tokenizer(source: str, revision: str) -> bytes:
    """The tokenizer of a folder or hub id as a tokenizer.json."""
    path = Path(source) / "tokenizer.json"
    return path.read_bytes() if path.is_file() else fast_tokenizer(source, revision).backend_tokenizer.to_str().encode()


def fast_tokenizer(source: str, revision: str) -> Any:
    """The tokenizer as transformers holds it; `InputError` if it cannot be written as a tokenizer.json."""
    from transformers import AutoTokenizer

    tokenizer = pretrained(AutoTokenizer, source, revision)
    if not tokenizer.is_fast:
        raise InputError(f"{source}: expected a fast tokenizer (tokenizer.json), found a slow one")
    return tokenizer


@lru_cache(maxsize=4)
def digest(module: nn.Module) -> str:
    """sha256 over the names and values of all parameters and buffers; computed once, as the module is frozen."""
    return sha256_json({name: sha256_tensor(array(tensor)) for name, tensor in module.state_dict().items()})


def no_bars_in_a_log() -> None:
    """Transformers draws its progress bars only on a terminal."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
