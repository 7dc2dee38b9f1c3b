"""The frozen parts: a decoder language model and a sentence encoder, Hugging Face's or small ones with random weights.

Shapes: N texts, W tokens, E width.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.errors import InputError
from runtimes.pipelines.hallucination.detector import ENCODER_TOKENIZER
from runtimes.pipelines.hallucination.grounding import TEMPLATE, TOKENIZER
from training.frozen import EAGER, FrozenEncoder, fast_tokenizer, load_frozen, pretrained, stored_tokenizer
from training.random_init import BYTES, PREFIX, SPECIAL, byte_tokenizer, is_random

ENCODERS = ("bert", "roberta", "xlm-roberta")
FAMILIES = ("llama", "mistral", "qwen2")
STATIC_ROPES = ("default", "linear", "llama3", "yarn")  # their frequencies do not depend on the length
# One small decoder of each family, and those that the benchmarks measure. vLLM has no attention on a CPU for heads
# narrower than 32.
DECODERS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    },
    "bench": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
VOCABULARIES = {"bench": 4000, "7b": 32_000}
INTERMEDIATE = {"7b": 11_008}
CHAT = {"before": "<s>[INST] ", "after": " [/INST] "}
SYSTEM = "You are a helpful assistant."
MARK = "\u2042PROMPT\u2042"  # placeholder of the prompt in the chat format


class SentenceEncoder(FrozenEncoder):
    """Token ids int64 [N, W] become unit vectors float32 [N, E]: the first token's, as BGE's."""

    def __init__(self, source: str, revision: str) -> None:
        super().__init__(load_encoder(source, revision))

    def forward(self, ids_NW: Tensor) -> Tensor:
        first_NE = self.read(ids_NW)[0].last_hidden_state[:, 0]
        return nn.functional.normalize(first_NE.float(), dim=-1, eps=1e-6)


@lru_cache(maxsize=2)
def load_decoder(source: str, revision: str) -> Any:
    """The causal language model `source` in float32 on the CPU; loaded once per process, as it never changes."""
    from transformers import AutoModelForCausalLM

    config = decoder_config(source, revision)
    return load_frozen(AutoModelForCausalLM, source, revision, config=config, dtype=torch.float32)


@lru_cache(maxsize=2)
def load_encoder(source: str, revision: str) -> Any:
    """The sentence encoder `source`, without a pooler; loaded once per process."""
    from transformers import AutoModel

    return load_frozen(AutoModel, source, revision, config=encoder_config(source, revision), seed=1, **EAGER)


def encoder_config(source: str, revision: str) -> Any:
    """The config of a sentence encoder; `InputError` unless its family is in `ENCODERS`."""
    from transformers import AutoConfig, BertConfig

    if is_random(source):
        return BertConfig(
            vocab_size=BYTES,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            initializer_range=0.3,  # with the usual 0.02 every text has nearly the same vector
            pad_token_id=SPECIAL.index("<pad>"),
        )
    config = pretrained(AutoConfig, source, revision)
    if config.model_type not in ENCODERS:
        raise InputError(f"{source}: expected an encoder of {', '.join(ENCODERS)}; found '{config.model_type}'")
    return config


def decoder_config(source: str, revision: str) -> Any:
    """The config of a decoder; `InputError` unless its family is in `FAMILIES` and its positions are static."""
    from transformers import AutoConfig

    config = _random_config(source) if is_random(source) else pretrained(AutoConfig, source, revision)
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if config.model_type not in FAMILIES or rope not in STATIC_ROPES:
        raise InputError(
            f"{source}: expected a decoder of {', '.join(FAMILIES)} with rotary positions of "
            f"{', '.join(STATIC_ROPES)}; found '{config.model_type}' with '{rope}'"
        )
    return config


def _random_config(source: str) -> Any:
    """`seeded:GEOMETRY` or `seeded:GEOMETRY:FAMILY`."""
    from transformers import AutoConfig

    name, _, family = source.removeprefix(PREFIX).partition(":")
    family = family or "llama"
    if name not in DECODERS or family not in FAMILIES:
        raise InputError(
            f"expected {PREFIX}GEOMETRY or {PREFIX}GEOMETRY:FAMILY with a geometry of {', '.join(DECODERS)} and a "
            f"family of {', '.join(FAMILIES)}; found '{source}'"
        )
    geometry = DECODERS[name]
    return AutoConfig.for_model(
        family,
        **{"head_dim": geometry["hidden_size"] // geometry["num_attention_heads"], **geometry},
        vocab_size=VOCABULARIES.get(name, BYTES),
        intermediate_size=INTERMEDIATE.get(name, 2 * geometry["hidden_size"]),
        max_position_embeddings=16_384,
        sliding_window=None,
        initializer_range=0.12,  # with the usual 0.02 attention is so even that every choice of a head is a near-tie
        bos_token_id=SPECIAL.index("<s>"),
        pad_token_id=SPECIAL.index("<pad>"),
        eos_token_id=SPECIAL.index("</s>"),
    )


def window(config: Any) -> int:
    """The largest number of tokens over which a decoder attends to all earlier ones."""
    sliding = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return int(min(config.max_position_embeddings, sliding or config.max_position_embeddings))


def tokenizer_json(source: str, revision: str) -> bytes:
    """The tokenizer of `source` as a tokenizer.json; a random model has byte tokens, and <s> first."""
    return byte_tokenizer(single="<s> $A", words=False) if is_random(source) else stored_tokenizer(source, revision)


@lru_cache(maxsize=4)
def template_json(source: str, revision: str) -> bytes:
    """The text of the chat format before and after a prompt; the begin token where `source` has no chat format."""
    if is_random(source):
        return json.dumps(CHAT).encode()
    tokenizer = fast_tokenizer(source, revision)
    if tokenizer.chat_template is None:
        return json.dumps({"before": tokenizer.bos_token or "", "after": "\n"}).encode()
    turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": MARK}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, found, after = written.partition(MARK)
    if not found:
        raise InputError(f"{source}: expected a chat template that repeats the prompt, found one that does not")
    return json.dumps({"before": before, "after": after}).encode()


def assets(config: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizers and the chat format, by the names under which the pipelines read them."""
    base = config["base"], config["base_revision"]
    found = {TOKENIZER: tokenizer_json(*base), TEMPLATE: template_json(*base)}
    if config["level"] == "chunk":
        found[ENCODER_TOKENIZER] = tokenizer_json(config["encoder"], config["encoder_revision"])
    return found
