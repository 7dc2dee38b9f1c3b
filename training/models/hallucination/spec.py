"""`hallucination` as the rest of Slipway sees it. Nothing here imports torch until it is called.

hallucination         tokens in: the features of a frozen decoder and the scorer's verdict, fused
hallucination_scorer  the scorer over features that are known already, such as those of a public score log
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.artifact import Check
from runtimes.errors import InputError
from runtimes.pipelines.hallucination import ENCODER_TOKENIZER, TEMPLATE, TOKENIZER
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.models.hallucination.units import Head
from training.spec import Config, Frozen, ModelSpec, Preset, Recipe, Tolerance

if TYPE_CHECKING:
    from torch import nn

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
# The 32 heads of Llama-2 7B chat that copy most, best first (ReDeEP's own list).
COPYING = (
    "25.0 18.13 18.10 27.9 5.29 23.8 31.28 3.0 31.24 13.20 31.18 1.14 2.5 22.10 2.22 15.7 3.19 20.17 10.20 23.30 20.22 "
    "1.27 20.1 31.19 28.18 20.15 1.21 19.1 20.5 16.1 18.9 5.13"
)
BYTE_IDS = (4, 260)  # ids that are neither special nor beyond the smallest vocabulary
# A near-tie between two choices of a head is none that a conversion can be held to.
NEAR_TIE = 1.0  # times the relative tolerance
MOST_NEAR_TIES = 0.05  # of all choices, in fp32; other precisions say how many there were


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
    return " ".join(f"{layer}.{head}" for layer, head in heads)


def layer_text(layers: tuple[int, ...]) -> str:
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


def settle(config: Config) -> Config:
    """The config with `all` heads and layers named; `InputError` for those that the base does not have."""
    from training.models.hallucination.frozen import decoder_config, window

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
    return named


def signature(config: Config) -> Signature:
    """A tokenized answer in its context in; features, scores and what they are scores of out."""
    check(config)
    heads, layers = len(heads_of(config)), len(layers_of(config))
    axes = [
        Axis(name="batch", min=1, opt=2, max=config["max_batch"]),
        _axis("tokens", config["min_tokens"], config["max_tokens"]),
        _axis("rows", 1, config["max_rows"]),
        _axis("chunks", 1, config["max_chunks"]),
    ]
    inputs = [
        TensorSpec(name="token_ids", dtype="int64", shape=("batch", "tokens")),
        TensorSpec(name="rows", dtype="int64", shape=("batch", "rows")),
        TensorSpec(name="prompt_range", dtype="int64", shape=("batch", 2)),
        TensorSpec(name="row_spans", dtype="int64", shape=("batch", "chunks", 2)),
        TensorSpec(name="characters", dtype="int64", shape=("batch", "chunks", 2)),
    ]
    if config["level"] == "chunk":
        axes += [
            _axis("prompt_chunks", 1, config["max_prompt_chunks"]),
            _axis("chunk_tokens", 2, config["chunk_tokens"]),
        ]
        axes.append(_axis("prompt_chunk_tokens", 2, config["chunk_tokens"]))
        inputs += [
            TensorSpec(name="prompt_spans", dtype="int64", shape=("batch", "prompt_chunks", 2)),
            TensorSpec(name="chunk_ids", dtype="int64", shape=("batch", "chunks", "chunk_tokens")),
            TensorSpec(name="prompt_chunk_ids", dtype="int64", shape=("batch", "prompt_chunks", "prompt_chunk_tokens")),
        ]
    outputs = (
        TensorSpec(name="ecs", dtype="float32", shape=("batch", "chunks", heads)),
        TensorSpec(name="pks", dtype="float32", shape=("batch", "chunks", layers)),
        TensorSpec(name="scores", dtype="float32", shape=("batch", "chunks")),
        TensorSpec(name="response_score", dtype="float32", shape=("batch",)),
        TensorSpec(name="gaps", dtype="float32", shape=("batch", "chunks", heads)),
        TensorSpec(name="spans", dtype="int64", shape=("batch", "chunks", 2)),
    )
    return Signature(inputs=tuple(inputs), outputs=outputs, axes=tuple(axes))


def scorer_signature(config: Config) -> Signature:
    heads, layers = len(heads_of(config)), len(layers_of(config))
    return Signature(
        inputs=(
            TensorSpec(name="ecs", dtype="float32", shape=("batch", "chunks", heads)),
            TensorSpec(name="pks", dtype="float32", shape=("batch", "chunks", layers)),
            TensorSpec(name="lengths", dtype="int64", shape=("batch", "chunks")),
        ),
        outputs=(
            TensorSpec(name="scores", dtype="float32", shape=("batch", "chunks")),
            TensorSpec(name="response_score", dtype="float32", shape=("batch",)),
        ),
        axes=(Axis(name="batch", min=1, opt=8, max=config["max_batch"]), _axis("chunks", 1, config["max_chunks"])),
    )


def _axis(name: str, least: int, most: int) -> Axis:
    return Axis(name=name, min=least, opt=max(2, least, most // 3), max=most)


def build(config: Config) -> "nn.Module":
    from training.models.hallucination.module import ChunkDetector, TokenDetector

    check(config)
    return ChunkDetector(config) if config["level"] == "chunk" else TokenDetector(config)


def build_scorer(config: Config) -> "nn.Module":
    from training.models.hallucination.module import ScorerAlone

    return ScorerAlone(config)


def assets(config: Config) -> Mapping[str, bytes]:
    """The tokenizers, and what the chat format puts around a prompt."""
    from training.models.hallucination.frozen import template_json, tokenizer_json

    base = config["base"], config["base_revision"]
    found = {TOKENIZER: tokenizer_json(*base), TEMPLATE: template_json(*base)}
    if config["level"] == "chunk":
        found[ENCODER_TOKENIZER] = tokenizer_json(config["encoder"], config["encoder_revision"])
    return found


def frozen(config: Config) -> tuple[Frozen, ...]:
    base = Frozen(prefix="base", source=config["base"], revision=config["base_revision"])
    encoder = Frozen(prefix="encoder", source=config["encoder"], revision=config["encoder_revision"])
    return (base, encoder) if config["level"] == "chunk" else (base,)


def feeds(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], probe: Tensors) -> Tensors:
    """Token ids of the probe, or made-up ones, cut anew: a prompt, an answer in chunks, the last of them padding."""
    batch, tokens, rows, count = (sizes[name] for name in ("batch", "tokens", "rows", "chunks"))
    answer = min(rows, tokens // 2)
    middle = tokens - answer
    first = int(rng.integers(0, max(1, middle // 4)))
    places = np.minimum(np.arange(rows), answer - 1) + middle - 1
    spans = _spans(0, answer, count)
    if count > 2:
        spans[-1] = 0
    result = {
        "token_ids": _ids(rng, (batch, tokens), probe.get("token_ids")),
        "rows": np.tile(places, (batch, 1)),
        "prompt_range": np.tile([first, middle], (batch, 1)),
        "row_spans": np.tile(spans, (batch, 1, 1)),
        "characters": np.tile(spans * 5, (batch, 1, 1)),
    }
    if config["level"] == "chunk":
        context = sizes["prompt_chunks"]
        result["prompt_spans"] = np.tile(_spans(first, middle, context), (batch, 1, 1))
        for name, chunks, length in (
            ("chunk_ids", count, sizes["chunk_tokens"]),
            ("prompt_chunk_ids", context, sizes["prompt_chunk_tokens"]),
        ):
            result[name] = _ids(rng, (batch, chunks, length), probe.get(name))
    return {name: values.astype(np.int64) for name, values in result.items()}


def _spans(start: int, end: int, count: int) -> np.ndarray:
    """[count, 2]: pieces of like length, or of one place and then empty ones where there are too few."""
    edges = np.linspace(start, end, min(count, end - start) + 1).astype(int)
    spans = np.zeros((count, 2), int)
    spans[: len(edges) - 1] = np.stack([edges[:-1], edges[1:]], -1)
    return spans


def _ids(rng: np.random.Generator, shape: tuple[int, ...], real: np.ndarray | None) -> np.ndarray:
    """Token ids: pieces of real rows, repeated where they are too short."""
    if real is None:
        return rng.integers(*BYTE_IDS, shape)
    rows = real.reshape(-1, real.shape[-1])
    chosen = rows[rng.integers(0, len(rows), shape[:-1])]
    offsets = rng.integers(0, real.shape[-1], (*shape[:-1], 1))
    return np.take_along_axis(chosen, (np.arange(shape[-1]) + offsets) % real.shape[-1], -1)


def scorer_feeds(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], probe: Tensors) -> Tensors:
    """Features of the probe, or made-up ones; the last chunk of the last row is padding."""
    shape = sizes["batch"], sizes["chunks"]
    result = {}
    for name, width in (("ecs", len(heads_of(config))), ("pks", len(layers_of(config)))):
        made = rng.random((*shape, width))
        if name in probe:
            rows = probe[name].reshape(-1, width)
            made = rows[rng.integers(0, len(rows), shape)]
        result[name] = made.astype(np.float32)
    lengths = rng.integers(1, 200, shape)
    if shape[1] > 1:
        lengths[-1, -1] = 0
    return {**result, "lengths": lengths.astype(np.int64)}


def settled(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """`got` with the original's numbers where a head's choice hung on less than the precision: parity is blind there.

    How much that is, `agreement` limits. Scores are then the scorer's over those features and stay as they were said:
    they are compared in full wherever no choice was so close.
    """
    close = want["gaps"] <= _near(tolerance)
    clear_BC, clear_B = ~close.any(-1), ~close.any((-1, -2))
    keep = {
        "ecs": ~close,
        "gaps": np.zeros_like(close),  # a difference of two numbers that are close; compared by what it decides
        "scores": clear_BC,
        "response_score": clear_B,
    }
    return {name: np.where(keep[name], values, want[name]) if name in keep else values for name, values in got.items()}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Rank order of the scores of chunks without a near-tie, and the share of choices too close to be compared."""
    close = want["gaps"] <= _near(tolerance)
    clear_BC = ~close.any(-1)
    exact = tolerance.relative <= 1e-4
    return {
        "same_order": same_order(got["scores"][clear_BC], want["scores"][clear_BC], tolerance),
        "near_ties": Check(value=float(close.mean()), limit=MOST_NEAR_TIES if exact else 1.0),
    }


def same_order(got: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> Check:
    """The share of pairs that the original ranks, by more than the tolerance, and `got` ranks alike."""
    one, other = got.astype(np.float64), want.astype(np.float64)
    apart = np.abs(other[:, None] - other) > 2 * (
        tolerance.absolute + tolerance.relative * np.abs(other).max(initial=0)
    )
    same = (np.sign(one[:, None] - one) == np.sign(other[:, None] - other))[apart]
    return Check(value=float(same.mean()) if apart.any() else 1.0, limit=1.0, at_least=True)


def scorer_agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    return {"same_order": same_order(got["response_score"], want["response_score"], tolerance)}


def _near(tolerance: Tolerance) -> float:
    return NEAR_TIE * tolerance.relative


def recipe() -> type[Recipe]:
    from training.models.hallucination.recipe import HallucinationRecipe

    return HallucinationRecipe


def scorer_recipe() -> type[Recipe]:
    from training.models.hallucination.recipe import ScorerRecipe

    return ScorerRecipe


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
TRAINING: Config = {
    "scores": "",  # a score log to use in place of features read from texts
    "fit": "grid",  # or published: top_n, top_k, alpha and m as they stand
    "select": "auc",  # or mi: what heads and layers are ranked by
    "top_n": 3,
    "top_k": 4,
    "alpha": 0.6,
    "m": 1.0,
    "folds": 5,
    "most": 7,  # heads, and layers, that the grid goes up to
    "ensemble": 1,  # selections whose scores are averaged
    "valid_share": 0.25,
    "generator": "",  # only answers of this model
    "store": "",
    "responses": 120,
    "longest": 0,  # tokens that are read of an answer in its context; 0 is max_tokens
    "loading": "fp32",  # or fp16, bf16, int8, nf4, or stored: as the checkpoint has it
    "device_map": "",  # or auto, balanced: accelerate spreads the layers over GPUs, and the CPU
    "max_memory": "",  # such as '0:12GiB cpu:20GiB'
    "compile": False,  # the layers, by torch.compile
    "padded_size": 8192,  # tokens of a batch, padding included
    "profile": "",  # settings of a known machine, or auto
}
TOLERANCE = {
    "fp32": Tolerance(absolute=2e-5, relative=1e-5),
    "fp16": Tolerance(absolute=5e-2, relative=2e-2),
    "bf16": Tolerance(absolute=2e-1, relative=5e-2),
    "int8": Tolerance(absolute=2e-1, relative=5e-2),
}
SPECS = (
    ModelSpec(
        name="hallucination",
        pipeline="hallucination",
        presets={
            "tiny": Preset(config=TINY, training=TRAINING),
            "full": Preset(config=CONFIG, training={**TRAINING, "loading": "fp16", "profile": "auto"}),
        },
        signature=signature,
        build=build,
        feeds=feeds,
        agreement=agreement,
        settled=settled,
        exact=("encoder", "scorer"),
        tolerance=TOLERANCE,
        recipe=recipe,
        frozen=frozen,
        settle=settle,
        assets=assets,
        skips={"vllm": "serves the generator, not what reads its attention; export the generator's own model"},
    ),
    ModelSpec(
        name="hallucination_scorer",
        pipeline="hallucination_scorer",
        presets={"tiny": Preset(config={**SCORER, "max_batch": 512, "max_chunks": 32}, training=TRAINING)},
        signature=scorer_signature,
        build=build_scorer,
        feeds=scorer_feeds,
        agreement=scorer_agreement,
        tolerance={"fp32": Tolerance(absolute=2e-5, relative=1e-5)},
        recipe=scorer_recipe,
        skips={"vllm": "not a decoder language model"},
    ),
)
