"""The frozen base: any decoder or encoder of Hugging Face's, or a small Qwen2 with random weights.

Shapes: B rows, T tokens, D width of the base.
"""

from typing import Any

import torch
from torch import Tensor, nn

from training.frozen import MASKED, load_frozen
from training.random_init import geometry, is_random

GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 1024, "max_position_embeddings": 512,
    },
    "small": {
        "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 1536, "vocab_size": 30_522, "max_position_embeddings": 1024,
    },
    "base": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 3072, "vocab_size": 30_522, "max_position_embeddings": 1024,
    },
    "1.5b": {
        "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "intermediate_size": 8960, "vocab_size": 151_936, "max_position_embeddings": 131_072,
    },
    "7b": {
        "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "intermediate_size": 18_944, "vocab_size": 152_064, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
ENCODERS = ("electra", "mpnet")  # besides all whose name has "bert" in it


def load_base(source: str, revision: str) -> Any:
    """A new copy of the base `source` in float32, frozen, in eval mode; `InputError` if there is none."""
    from transformers import AutoModel

    return load_frozen(AutoModel, source, revision, config=random_config(source), dtype=torch.float32)


def random_config(source: str) -> Any:
    """The config of a Qwen2 with random weights, or None if `source` is a folder or a hub id."""
    from transformers import Qwen2Config

    return Qwen2Config(**geometry(source, GEOMETRIES)) if is_random(source) else None


def is_encoder(model: nn.Module) -> bool:
    """Whether every token attends to all others; in a decoder it attends to those before it."""
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    return "bert" in kind or kind in ENCODERS


def hidden_states(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The base's last hidden states [B, T, D], the same for rows padded on the left and on the right.

    The mask has four dimensions, which every model takes unchanged: from a mask of two dimensions transformers makes
    -inf in float16, and a row that starts with padding becomes NaN.
    """
    dtype = model.get_input_embeddings().weight.dtype
    hidden_B11T = (mask_BT == 0)[:, None, None, :]
    if is_encoder(model):
        return model(input_ids=ids_BT, attention_mask=hidden_B11T.to(dtype) * MASKED).last_hidden_state
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    future_TT = places_T[None, :] > places_T[:, None]
    hidden_B1TT = hidden_B11T | future_TT
    # In float: TensorRT has no cumulative sum of integers.
    positions_BT = (mask_BT.float().cumsum(1) - 1).clamp_min(0).to(torch.int64)
    answer = model(
        input_ids=ids_BT, attention_mask=hidden_B1TT.to(dtype) * MASKED, position_ids=positions_BT, use_cache=False
    )
    return answer.last_hidden_state


def pool(states_BTD: Tensor, mask_BT: Tensor, how: str) -> Tensor:
    """One state for each row [B, D]: that of the last or first real token (`last`, `cls`), or the mean of all."""
    if how == "mean":
        mask_BT1 = mask_BT.unsqueeze(-1).to(states_BTD.dtype)
        return (states_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
    places_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    if how == "last":
        chosen_B = (places_T * mask_BT).amax(1)
    else:
        chosen_B = torch.where(mask_BT > 0, places_T, mask_BT.shape[1] - 1).amin(1)
    return states_BTD.gather(1, chosen_B[:, None, None].expand(-1, 1, states_BTD.shape[-1])).squeeze(1)
