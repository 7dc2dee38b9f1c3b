"""Frozen models, taken as they come from Hugging Face and never trained: what all models that have some share.

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
from training.checkpoint import array, sha256_tensor

MASKED = -1e4  # added to attention scores of what may not be seen; fits float16, and a row of nothing else stays finite
EAGER = {"attn_implementation": "eager"}  # the smallest graph: sdpa is exported with a check for NaN in every layer


class FrozenModule(nn.Module):
    """A model that is never trained and always in eval mode."""

    def train(self, mode: bool = True) -> "FrozenModule":
        return super().train(False)


def pretrained(kind: Any, source: str, revision: str, **options: Any) -> Any:
    """`kind` (a class of transformers with from_pretrained) of a folder or hub id; `InputError` if there is none.

    Also if it is packed in a way that a package reads which is not installed.
    """
    no_bars_in_a_log()
    try:
        return kind.from_pretrained(source, revision=revision, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"expected a Hugging Face folder or hub id, found '{source}': {one_line(error)}") from error


def pretrained_model(kind: Any, source: str, revision: str, **options: Any) -> Any:
    """`kind` of a folder or hub id; `InputError` also for a missing weight, which every start would draw anew.

    Weights are read from safetensors alone: transformers would take a pickle where there are none.
    """
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, info = pretrained(kind, source, revision, **options)
    if missing := sorted(name for name in info["missing_keys"] if "pooler" not in name):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"{source}: expected the weights of {type(model).__name__}, found no {missing[0]}{more}")
    return model


def without_pooler(model: Any) -> Any:
    """The model without its pooler, which nobody reads: where a checkpoint lacks it, each start would draw another."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model


def freeze(model: Any) -> Any:
    """The model in evaluation, none of whose parameters takes a gradient."""
    return model.eval().requires_grad_(False)


def real_tokens(ids_BT: Tensor, pad: int) -> Tensor:
    """bool [B, T]; the first token counts always, so that a row of padding has something to attend to."""
    places = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    return (ids_BT != pad) | (places == 0)


def inputs(model: nn.Module, ids_BT: Tensor, real_BT: Tensor) -> dict[str, Tensor]:
    """Ids, mask, types and positions: given, for inside they are gathered and summed up, which TensorRT is poor at."""
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


def longest_input(config: Any) -> int:
    """The number of tokens that an encoder of this config has positions for."""
    skipped = config.pad_token_id + 1 if _counts_behind_padding(config) else 0
    return int(config.max_position_embeddings - skipped)


def _counts_behind_padding(config: Any) -> bool:
    """Whether positions begin behind the number of the padding token, as RoBERTa's and XLM-R's do."""
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
    """sha256 over the names and values of all parameters and buffers; of a frozen module, so it is computed once."""
    return sha256_json({name: sha256_tensor(array(tensor)) for name, tensor in module.state_dict().items()})


def no_bars_in_a_log() -> None:
    """Transformers draws its progress bars only where somebody sees them move."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
