"""The configs of the hallucination models, their limits, and the heads and layers that they name."""

from collections.abc import Mapping
from typing import Any

from runtimes.errors import InputError
from training.config import Config

CHOICES = {
    "level": ("chunk", "token"),
    "jsd": ("paper", "published"),
    "chunk_sum": ("mean", "sum"),
    "columns": ("prompt", "prefix"),
}
LEAST = {
    "members": 1,
    "top_percent": 1,
    "min_tokens": 8,
    "max_tokens": 16,
    "max_rows": 2,
    "max_chunks": 2,
    "max_prompt_chunks": 2,
    "chunk_tokens": 4,
    "chunk_characters": 8,
    "max_characters": 16,
}
Head = tuple[int, int]  # layer, head
# The 32 heads of Llama-2 7B chat that copy most, best first (ReDeEP's own list).
COPYING = (
    "25.0 18.13 18.10 27.9 5.29 23.8 31.28 3.0 31.24 13.20 31.18 1.14 2.5 22.10 2.22 15.7 3.19 20.17 10.20 23.30 20.22 "
    "1.27 20.1 31.19 28.18 20.15 1.21 19.1 20.5 16.1 18.9 5.13"
)


def heads_of(config: Mapping[str, Any]) -> tuple[Head, ...]:
    """The heads that the scorer reads, ascending, from text such as `25.0 18.13`."""
    try:
        found = {(int(layer), int(head)) for layer, head in (pair.split(".") for pair in config["heads"].split())}
    except ValueError as error:
        raise InputError(f"expected heads such as '25.0 18.13', or all; found '{config['heads']}'") from error
    if not found or min(min(pair) for pair in found) < 0:
        raise InputError(f"expected heads such as '25.0 18.13', or all; found '{config['heads']}'")
    return tuple(sorted(found))


def layers_of(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that the scorer reads, ascending, from text such as `23 24`."""
    texts = config["layers"].split()
    if not texts or not all(text.isdecimal() for text in texts):
        raise InputError(f"expected layers such as '23 24', or all; found '{config['layers']}'")
    return tuple(sorted(map(int, set(texts))))


def head_text(heads: tuple[Head, ...]) -> str:
    """Heads as settings have them: `layer.head layer.head`."""
    return " ".join(f"{layer}.{head}" for layer, head in heads)


def layer_text(layers: tuple[int, ...]) -> str:
    """Layers as settings have them, with blanks between."""
    return " ".join(map(str, layers))


def check(config: Config) -> None:
    """`InputError` unless a model of this config can be built."""
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise InputError(f"expected {name} of {', '.join(choices)}; found '{config[name]}'")
    for name, least in LEAST.items():
        if config[name] < least:
            raise InputError(f"expected {name} of {least} or more, found {config[name]}")
    if not 100 <= config["top_percent"] * config["min_tokens"] <= 50 * config["min_tokens"]:
        raise InputError(
            f"expected top_percent up to 50, and a token of min_tokens or more in that share; "
            f"found {config['top_percent']} and {config['min_tokens']}"
        )
    if config["max_tokens"] < config["min_tokens"]:
        raise InputError(f"expected max_tokens of {config['min_tokens']} or more, found {config['max_tokens']}")
    heads_of(config), layers_of(config)


def resolve_config(config: Config) -> Config:
    """The config with `all` replaced by names; `InputError` for heads and layers that the base does not have."""
    from training.frozen import longest_input
    from training.models.hallucination.frozen import decoder_config, encoder_config, window

    base = decoder_config(config["base"], config["base_revision"])
    layers, heads = base.num_hidden_layers, base.num_attention_heads
    named = dict(config)
    if config["heads"] == "all":
        named["heads"] = head_text(tuple((layer, head) for layer in range(layers) for head in range(heads)))
    if config["layers"] == "all":
        named["layers"] = layer_text(tuple(range(layers)))
    check(named)
    beyond = [f"head {head}" for head in heads_of(named) if head[0] >= layers or head[1] >= heads]
    beyond += [f"layer {layer}" for layer in layers_of(named) if layer >= layers]
    if beyond:
        raise InputError(
            f"{config['base']}: expected heads and layers of its {layers} layers of {heads} heads, "
            f"found {', '.join(beyond[:3])}{' ...' if len(beyond) > 3 else ''}"
        )
    if config["max_tokens"] > window(base):
        raise InputError(f"{config['base']}: expected max_tokens up to {window(base)}, found {config['max_tokens']}")
    if config["level"] == "chunk":
        longest = longest_input(encoder_config(config["encoder"], config["encoder_revision"]))
        if config["chunk_tokens"] > longest:
            raise InputError(
                f"{config['encoder']}: expected chunk_tokens up to {longest}, found {config['chunk_tokens']}"
            )
    return named


CONFIG: Config = {
    "base": "meta-llama/Llama-2-7b-chat-hf",
    "base_revision": "main",
    "encoder": "BAAI/bge-base-en-v1.5",
    "encoder_revision": "main",
    "level": "chunk",
    "jsd": "paper",
    "chunk_sum": "mean",
    "columns": "prompt",
    "heads": COPYING,
    "layers": "all",
    "members": 1,
    "threshold": 0.5,
    "top_percent": 10,
    "min_tokens": 16,
    "max_tokens": 4096,
    "max_characters": 12_000,
    "max_rows": 1024,
    "max_chunks": 32,
    "max_prompt_chunks": 128,
    "chunk_tokens": 256,
    "chunk_characters": 400,
    "max_batch": 4,
}
TINY: Config = {
    **CONFIG,
    "base": "seeded:tiny",
    "encoder": "seeded:tiny",
    "heads": head_text(tuple((layer, head) for layer in range(4) for head in range(4))),
    "layers": layer_text(tuple(range(4))),
    "max_tokens": 768,
    "max_rows": 256,
    "max_chunks": 8,
    "max_prompt_chunks": 16,
    "chunk_tokens": 128,
    "chunk_characters": 60,
}
SCORER: Config = {name: TINY[name] for name in ("level", "heads", "layers", "members", "threshold")}
