"""The frozen parts: a text encoder and an emotion classifier, any of Hugging Face's, or small ones with random weights.

Shapes: B rows, T tokens, D width.
"""

import hashlib
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from runtimes.errors import InputError
from runtimes.pipelines.strategy.dialogue import EMOTIONS
from training.frozen import (
    EAGER,
    FrozenEncoder,
    freeze,
    load_frozen,
    pretrained,
    stored_tokenizer,
    without_pooler,
)
from training.random_init import BYTES, byte_tokenizer, geometry, is_random

SINGLE, PAIR = "<s> $A </s>", "<s> $A </s> </s> $B </s>"  # as XLM-R puts its special tokens
VOCABULARY = 250_002  # of XLM-R; the byte tokenizer of a random base or large uses only a part of it
GEOMETRIES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": BYTES},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": VOCABULARY},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "vocab_size": VOCABULARY},
}


class TextEncoder(FrozenEncoder):
    """Token ids int64 [B, T] become one vector each, float32 [B, D]: the first token's, or the mean."""

    def __init__(self, source: str, revision: str, pooling: str) -> None:
        super().__init__(load_encoder(source, revision))
        self.pooling = pooling

    def forward(self, ids_BT: Tensor) -> Tensor:
        output, real_BT = self.read(ids_BT)
        states_BTD = output.last_hidden_state.float()
        if self.pooling == "cls":
            return states_BTD[:, 0]
        real_BT1 = real_BT.unsqueeze(-1).float()
        return (states_BTD * real_BT1).sum(1) / real_BT1.sum(1)


class EmotionClassifier(FrozenEncoder):
    """Token ids int64 [B, T] become raw logits float32 [B, 7]."""

    def __init__(self, source: str, revision: str) -> None:
        super().__init__(load_classifier(source, revision))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.read(ids_BT)[0].logits.float()


class Float32LayerNorm(nn.LayerNorm):
    """A layer norm in float32 also inside a float16 model: squares of XLM-R's activations do not fit float16."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


@lru_cache(maxsize=2)
def load_encoder(source: str, revision: str) -> nn.Module:
    """The encoder `source`, without a pooler; loaded once per process, as it never changes."""
    from transformers import AutoModel

    return _exact(load_frozen(AutoModel, source, revision, config=random_config(source), seed=0, **EAGER))


def load_untrained_encoder(source: str) -> nn.Module:
    """An encoder of the config in a folder, for weights that are loaded over it."""
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_config(pretrained(AutoConfig, source, "main"), **EAGER)
    return _exact(freeze(without_pooler(model)))


@lru_cache(maxsize=2)
def load_classifier(source: str, revision: str) -> nn.Module:
    """The emotion classifier `source`; `InputError` unless it has the seven emotions."""
    from transformers import AutoModelForSequenceClassification

    if config := random_config(source):
        config.num_labels = len(EMOTIONS)
    model = load_frozen(AutoModelForSequenceClassification, source, revision, config=config, seed=1, **EAGER)
    if model.config.num_labels != len(EMOTIONS):
        raise InputError(f"{source}: expected {len(EMOTIONS)} emotions, found {model.config.num_labels} labels")
    return _exact(model)


def random_config(source: str) -> Any:
    """The config of an XLM-R with random weights, or None if `source` is a folder or a hub id."""
    from transformers import XLMRobertaConfig

    if not is_random(source):
        return None
    sizes = geometry(source, GEOMETRIES)
    return XLMRobertaConfig(
        **sizes,
        intermediate_size=4 * sizes["hidden_size"],
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )


def encoder_width(source: str, revision: str) -> int:
    """The width of an encoder's vectors; its weights are not read."""
    from transformers import AutoConfig

    config = random_config(source) or pretrained(AutoConfig, source, revision, **EAGER)
    return int(config.hidden_size)


def tokenizer_json(source: str, revision: str) -> bytes:
    """The tokenizer of `source` as a tokenizer.json; that of a random model has a token for each byte."""
    return byte_tokenizer(single=SINGLE, pair=PAIR) if is_random(source) else stored_tokenizer(source, revision)


def sha256_bytes(data: bytes) -> str:
    """In hex."""
    return hashlib.sha256(data).hexdigest()


def _exact(model: nn.Module) -> nn.Module:
    """The model with its layer norms in float32."""
    for parent in list(model.modules()):
        for child in parent.children():
            if type(child) is nn.LayerNorm:
                child.__class__ = Float32LayerNorm
    return model
