"""The frozen parts: a text encoder and an emotion classifier, any of Hugging Face's, or small seeded ones.

Shapes: B rows, T tokens, D width.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.artifact import sha256_json
from runtimes.dialogue import EMOTIONS
from runtimes.errors import InputError, one_line, require
from training.checkpoint import array, sha256_tensor

SEEDED = "seeded:"
BYTES = 256
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the ids of XLM-R
VOCABULARY = 250_002  # of XLM-R, which base and large have without reading most of it
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": BYTES + len(SPECIAL)},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": VOCABULARY},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": VOCABULARY},
}
MASKED = -1e4  # added to attention scores of padding; fits float16
WITHOUT_OFFSET = ("bert", "distilbert", "electra")
EAGER = {"attn_implementation": "eager"}  # the smallest graph: sdpa is exported with a check for NaN in every layer


class FrozenModule(nn.Module):
    """A model that is never trained and always in eval mode."""

    def train(self, mode: bool = True) -> "FrozenModule":
        return super().train(False)


class TextEncoder(FrozenModule):
    """Token ids int64 [B, T] become one vector each, float32 [B, D]: the first token's, or the mean."""

    def __init__(self, source: str, revision: str, pooling: str) -> None:
        super().__init__()
        self.model: Any = load_encoder(source, revision)
        self.pooling = pooling

    def forward(self, ids_BT: Tensor) -> Tensor:
        real_BT = real_tokens(ids_BT, self.model.config.pad_token_id)
        states_BTD = self.model(**inputs(self.model, ids_BT, real_BT)).last_hidden_state.float()
        if self.pooling == "cls":
            return states_BTD[:, 0]
        real_BT1 = real_BT.unsqueeze(-1).float()
        return (states_BTD * real_BT1).sum(1) / real_BT1.sum(1)


class EmotionClassifier(FrozenModule):
    """Token ids int64 [B, T] become raw logits float32 [B, 7]."""

    def __init__(self, source: str, revision: str) -> None:
        super().__init__()
        self.model: Any = load_classifier(source, revision)

    def forward(self, ids_BT: Tensor) -> Tensor:
        real_BT = real_tokens(ids_BT, self.model.config.pad_token_id)
        return self.model(**inputs(self.model, ids_BT, real_BT)).logits.float()


class Float32LayerNorm(nn.LayerNorm):
    """Computes in float32 whatever the rest does: squares of XLM-R's activations do not fit float16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


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
    if config.model_type not in WITHOUT_OFFSET and "roberta" in config.model_type:
        places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) + config.pad_token_id + 1
        result["position_ids"] = torch.where(real_BT, places_T, config.pad_token_id)
    return result


@lru_cache(maxsize=2)
def load_encoder(source: str, revision: str) -> nn.Module:
    """The encoder `source`, without a pooler; loaded once per process, as it never changes."""
    from transformers import AutoModel, XLMRobertaModel

    if config := seeded_config(source):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = XLMRobertaModel._from_config(config, **EAGER)
    else:
        model = _pretrained(AutoModel, source, revision)
    if hasattr(model, "pooler"):
        model.pooler = None  # not read; and where a checkpoint lacks it, it would be another one at every start
    return _frozen(model)


def load_untrained_encoder(source: str) -> nn.Module:
    """An encoder of the config in a folder, for weights that are loaded over it."""
    from transformers import AutoConfig, AutoModel

    model: Any = AutoModel.from_config(_pretrained(AutoConfig, source, "main"), **EAGER)
    model.pooler = None
    return _frozen(model)


@lru_cache(maxsize=2)
def load_classifier(source: str, revision: str) -> nn.Module:
    """The emotion classifier `source`; `InputError` unless it has the seven emotions."""
    from transformers import AutoModelForSequenceClassification, XLMRobertaForSequenceClassification

    if config := seeded_config(source):
        config.num_labels = len(EMOTIONS)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return _frozen(XLMRobertaForSequenceClassification._from_config(config, **EAGER))
    model = _pretrained(AutoModelForSequenceClassification, source, revision)
    if model.config.num_labels != len(EMOTIONS):
        raise InputError(f"{source}: expected {len(EMOTIONS)} emotions, found {model.config.num_labels} labels")
    return _frozen(model)


def seeded_config(source: str) -> Any:
    """The config of a seeded XLM-R, or None if `source` is a folder or a hub id."""
    from transformers import XLMRobertaConfig

    if not source.startswith(SEEDED):
        return None
    name = source.removeprefix(SEEDED)
    if name not in GEOMETRIES:
        raise InputError(f"expected a geometry of {', '.join(GEOMETRIES)} behind '{SEEDED}', found '{name}'")
    geometry = GEOMETRIES[name]
    return XLMRobertaConfig(
        **geometry,
        intermediate_size=4 * geometry["hidden_size"],
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


def encoder_width(source: str, revision: str) -> int:
    """The width of an encoder's vectors; its weights are not read."""
    from transformers import AutoConfig

    config = seeded_config(source) or _pretrained(AutoConfig, source, revision)
    return int(config.hidden_size)


@lru_cache(maxsize=4)
def tokenizer_json(source: str, revision: str) -> bytes:
    """The tokenizer of `source` as a tokenizer.json; that of a seeded model reads bytes."""
    from transformers import AutoTokenizer

    if source.startswith(SEEDED):
        return byte_tokenizer()
    path = Path(source) / "tokenizer.json"
    if path.is_file():
        return path.read_bytes()
    tokenizer = _pretrained(AutoTokenizer, source, revision)
    if not tokenizer.is_fast:
        raise InputError(f"{source}: expected a fast tokenizer (tokenizer.json), found a slow one")
    return tokenizer.backend_tokenizer.to_str().encode()


def byte_tokenizer() -> bytes:
    """A tokenizer.json that makes every byte of UTF-8 a token between <s> and </s>."""
    tokenizers = require("tokenizers", extra="strategy")
    from tokenizers import decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    ends = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer.to_str().encode()


@lru_cache(maxsize=4)
def digest(module: nn.Module) -> str:
    """sha256 over the names and values of all parameters and buffers; of a frozen module, so it is computed once."""
    return sha256_json({name: sha256_tensor(array(tensor)) for name, tensor in module.state_dict().items()})


def sha256_bytes(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _pretrained(kind: Any, source: str, revision: str) -> Any:
    try:
        return kind.from_pretrained(source, revision=revision, **EAGER)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a Hugging Face folder or hub id, found '{source}': {one_line(error)}") from error


def _frozen(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for child in parent.children():
            if type(child) is nn.LayerNorm:
                child.__class__ = Float32LayerNorm
    return model.eval().requires_grad_(False)
