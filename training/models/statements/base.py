"""The frozen base: any decoder or encoder of Hugging Face's, or a small seeded Qwen2.

Shapes: B rows, T tokens, D width of the base.
"""

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.errors import InputError, one_line, require
from training.models.statements.data import flatten, synthetic_papers

SEEDED = "seeded:"
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 128, "vocab_size": 1024, "max_position_embeddings": 512,
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
PAD, END = "<pad>", "<end>"
ENCODERS = ("electra", "mpnet")  # besides all whose name has "bert" in it
MASKED = -1e4  # added to attention scores of what may not be seen; fits float16, and a row of nothing else stays finite


def load_base(source: str, revision: str) -> Any:
    """A new copy of the base `source` in float32, frozen, in eval mode; `InputError` if there is none."""
    from transformers import AutoModel

    config = seeded_config(source)
    if config is None:
        model: Any = _pretrained(AutoModel, source, revision, dtype=torch.float32)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModel.from_config(config)
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # not read; and where a checkpoint lacks it, it would be another one at every start
    return model.eval().requires_grad_(False)


def base_width(source: str, revision: str) -> int:
    """The width of the base's hidden states; its weights are not read."""
    from transformers import AutoConfig

    return int((seeded_config(source) or _pretrained(AutoConfig, source, revision)).hidden_size)


def seeded_config(source: str) -> Any:
    """The config of a seeded Qwen2, or None if `source` is a folder or a hub id."""
    from transformers import Qwen2Config

    if not source.startswith(SEEDED):
        return None
    name = source.removeprefix(SEEDED)
    if name not in GEOMETRIES:
        raise InputError(f"expected a geometry of {', '.join(GEOMETRIES)} behind '{SEEDED}', found '{name}'")
    return Qwen2Config(**GEOMETRIES[name])


def is_encoder(model: nn.Module) -> bool:
    """Whether every token sees all others; in a decoder it sees those before it."""
    kind = str(model.config.model_type)  # type: ignore[union-attr]
    return "bert" in kind or kind in ENCODERS


def hidden_states(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The base's last hidden states [B, T, D], alike whether a row is padded on the left or on the right.

    The mask is made here, in four dimensions, which every model takes as it is: what transformers makes of a mask in
    two dimensions is -inf in float16, and a row that starts with padding becomes NaN.
    """
    dtype = model.get_input_embeddings().weight.dtype
    hidden_B11T = (mask_BT == 0)[:, None, None, :]
    if is_encoder(model):
        return model(input_ids=ids_BT, attention_mask=hidden_B11T.to(dtype) * MASKED).last_hidden_state
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    future_TT = places_T[None, :] > places_T[:, None]
    hidden_B1TT = hidden_B11T | future_TT
    # Counted in float: TensorRT sums up no integers.
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


@lru_cache(maxsize=4)
def tokenizer_json(source: str, revision: str) -> bytes:
    """The tokenizer of `source` as a tokenizer.json; that of a seeded base was trained on synthetic statements."""
    from transformers import AutoTokenizer

    if source.startswith(SEEDED):
        texts, _ = flatten(synthetic_papers(seed=0, count=300))
        return train_tokenizer(texts, GEOMETRIES["tiny"]["vocab_size"])
    path = Path(source) / "tokenizer.json"
    if path.is_file():
        return path.read_bytes()
    tokenizer = _pretrained(AutoTokenizer, source, revision)
    if not tokenizer.is_fast:
        raise InputError(f"{source}: expected a fast tokenizer (tokenizer.json), found a slow one")
    return tokenizer.backend_tokenizer.to_str().encode()


def train_tokenizer(texts: list[str], vocabulary: int) -> bytes:
    """A byte-level BPE tokenizer as tokenizer.json; it ends every text with END, whose state is that of the text."""
    tokenizers = require("tokenizers", extra="statements")
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer.to_str().encode()


def _pretrained(kind: Any, source: str, revision: str, **options: Any) -> Any:
    no_bars_in_a_log()
    try:
        return kind.from_pretrained(source, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a Hugging Face folder or hub id, found '{source}': {one_line(error)}") from error


def no_bars_in_a_log() -> None:
    """Transformers draws its progress bars only where somebody sees them move."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
