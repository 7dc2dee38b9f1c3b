"""`strategy` and its parts as the rest of Slipway sees them. Nothing here imports torch until it is called.

strategy          texts in: all that follow fused, for callers without a cache
strategy_encoder  the frozen context encoder, whose output is kept by content
strategy_emotion  the frozen emotion classifier, likewise
strategy_parser   the frozen discourse parser, likewise, if the model was trained with one
strategy_graph    what was trained
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.artifact import Check
from runtimes.errors import InputError
from runtimes.pipelines.strategy.dialogue import DISCOURSE, EMOTIONS, ROOT, STRATEGIES
from runtimes.pipelines.strategy.discourse import PAIR_TOKENS
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.models.strategy.inputs import context_inputs, fused_inputs, graph_inputs, parser_inputs, turn_inputs
from training.spec import Config, Frozen, ModelSpec, Preset, Recipe, Tolerance

if TYPE_CHECKING:
    from torch import nn

LAYERS = 3
BATCH_MAX = 16
CHOICES = {
    "labels": tuple(STRATEGIES),
    "emotion": ("mixed", "hard"),
    "parser": ("none", "sddp"),
    "pooling": ("cls", "mean"),
}


def _batch() -> Axis:
    return Axis(name="batch", min=1, opt=4, max=BATCH_MAX)


def _graph_inputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="kinds", dtype="int64", shape=("batch", "turns")),
        TensorSpec(name="strategies", dtype="int64", shape=("batch", "turns")),
        TensorSpec(name="relations", dtype="int64", shape=("batch", "turns", "turns")),
    )


def _emotion_logits() -> TensorSpec:
    return TensorSpec(name="emotion_logits", dtype="float32", shape=("batch", "turns", len(EMOTIONS)))


def _parser_inputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="pair_ids", dtype="int64", shape=("batch", "pairs", "pair_tokens")),
        TensorSpec(name="pair_places", dtype="int64", shape=("batch", "turns", "turns")),
    )


def _parser_axes(config: Config) -> tuple[Axis, ...]:
    turns = _turns(config)
    pairs = Axis(name="pairs", min=1, opt=_pairs(turns.opt), max=_pairs(turns.max))
    return pairs, _tokens("pair_tokens", PAIR_TOKENS)


def _pairs(turns: int) -> int:
    return turns * (turns + 1) // 2


def _turns(config: Config) -> Axis:
    return Axis(name="turns", min=1, opt=min(5, config["max_turns"]), max=config["max_turns"])


def _answers(config: Config) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name="logits", dtype="float32", shape=("batch", len(STRATEGIES[config["labels"]]))),
        TensorSpec(name="emotions", dtype="float32", shape=("batch", "turns", len(EMOTIONS))),
        TensorSpec(name="attention", dtype="float32", shape=("batch", LAYERS, "turns")),
    )


def fused_signature(config: Config) -> Signature:
    """Token ids and the graph in; logits, emotions by turn and attention over turns out."""
    check(config)
    parsing = config["parser"] == "sddp"
    unparsed = (*_parser_inputs(), TensorSpec(name="edges_known", dtype="int64", shape=("batch",)))
    tokens = _tokens("tokens", config["max_tokens"]), _tokens("turn_tokens", config["turn_tokens"])
    return Signature(
        inputs=(
            TensorSpec(name="context_ids", dtype="int64", shape=("batch", "tokens")),
            TensorSpec(name="turn_ids", dtype="int64", shape=("batch", "turns", "turn_tokens")),
            _emotion_logits(),
            TensorSpec(name="emotion_known", dtype="int64", shape=("batch", "turns")),
            *_graph_inputs(),
            *(unparsed if parsing else ()),
        ),
        outputs=_answers(config),
        axes=(_batch(), _turns(config), *tokens, *(_parser_axes(config) if parsing else ())),
    )


def graph_signature(config: Config) -> Signature:
    check(config)
    context = TensorSpec(name="context", dtype="float32", shape=("batch", config["context_width"]))
    return Signature(
        inputs=(context, _emotion_logits(), *_graph_inputs()), outputs=_answers(config), axes=(_batch(), _turns(config))
    )


def parser_signature(config: Config) -> Signature:
    """Pairs of turns in, scores at [head, tail, relation] out."""
    check(config)
    scores = TensorSpec(name="pair_scores", dtype="float32", shape=("batch", "turns", "turns", len(DISCOURSE) + 1))
    return Signature(inputs=_parser_inputs(), outputs=(scores,), axes=(_batch(), _turns(config), *_parser_axes(config)))


def encoder_signature(config: Config) -> Signature:
    return _text_signature("context_vector", config["context_width"], config["max_tokens"])


def emotion_signature(config: Config) -> Signature:
    return _text_signature("turn_emotion", len(EMOTIONS), config["turn_tokens"])


def _text_signature(name: str, width: int, longest: int) -> Signature:
    return Signature(
        inputs=(TensorSpec(name="token_ids", dtype="int64", shape=("batch", "tokens")),),
        outputs=(TensorSpec(name=name, dtype="float32", shape=("batch", width)),),
        axes=(_batch(), _tokens("tokens", longest)),
    )


def _tokens(name: str, longest: int) -> Axis:
    return Axis(name=name, min=2, opt=max(2, longest // 2), max=longest)


def check(config: Config) -> None:
    """`InputError` unless a model of this config can be built."""
    for name, choices in CHOICES.items():
        if config[name] not in choices:
            raise InputError(f"expected {name} of {', '.join(choices)}; found '{config[name]}'")
    for name, least in {"hg_dim": 1, "max_tokens": 4, "turn_tokens": 4, "max_turns": 2, "context_width": 1}.items():
        if config[name] < least:
            raise InputError(f"expected {name} of {least} or more, found {config[name]}")
    if config["temperature"] <= 0:
        raise InputError(f"expected a temperature above 0, found {config['temperature']}")


def resolve_config(config: Config) -> Config:
    """The config with the width of the encoder that it names."""
    from training.models.strategy.frozen import encoder_width

    check(config)
    return {**config, "context_width": encoder_width(config["encoder"], config["encoder_revision"])}


def build(config: Config) -> "nn.Module":
    from training.models.strategy.module import Strategy

    check(config)
    return Strategy(config)


def assets(config: Config) -> Mapping[str, bytes]:
    """The tokenizers, and what names the frozen parts in a store."""
    from training.models.strategy.reading import identities, tokenizers

    named = {f"{part}_tokenizer.json": data for part, data in tokenizers(config).items()}
    return {**named, "shelves.json": json.dumps(identities(config), indent=1, sort_keys=True).encode()}


def frozen(config: Config) -> tuple[Frozen, ...]:
    parser = (Frozen(prefix="parser", source=config["parser_model"], revision="main"),)
    return (
        Frozen(prefix="encoder", source=config["encoder"], revision=config["encoder_revision"]),
        Frozen(prefix="emotion", source=config["emotion_model"], revision=config["emotion_revision"]),
        *(parser if config["parser"] == "sddp" else ()),
    )


def without_parser(config: Config) -> str | None:
    return None if config["parser"] == "sddp" else "trained without a parser; train with --parser sddp to have one"


def same_label(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Share of dialogues with the original's strategy, but for those in which the tolerance could decide."""
    return _same(got["logits"], want["logits"], tolerance)


def same_emotion(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    return _same(got["turn_emotion"], want["turn_emotion"], tolerance)


def same_tree(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Share of pairs with the original's relation, but for those in which the tolerance could decide."""
    return _same(got["pair_scores"][..., :ROOT], want["pair_scores"][..., :ROOT], tolerance)


def same_direction(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """The smallest cosine between a vector and the original's."""
    one, other = got["context_vector"].astype(np.float64), want["context_vector"].astype(np.float64)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    cosine = float(((one * other).sum(-1) / norms).min())
    return {"cosine": Check(value=cosine, limit=1 - 10 * tolerance.absolute**2 - 1e-6, at_least=True)}


def _same(got: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> dict[str, Check]:
    top = np.sort(want, -1)
    clear = top[..., -1] - top[..., -2] > 2 * (tolerance.absolute + tolerance.relative * np.abs(want).max())
    same = (got.argmax(-1) == want.argmax(-1)) & np.isfinite(got).all(-1)
    value = float(same[clear].mean()) if clear.any() else 1.0
    return {"same_label": Check(value=value, limit=1.0, at_least=True)}


def recipe() -> type[Recipe]:
    from training.models.strategy.recipe import StrategyRecipe

    return StrategyRecipe


CONFIG: Config = {
    "labels": "esconv",
    "encoder": "FacebookAI/xlm-roberta-large",
    "encoder_revision": "main",
    "pooling": "cls",
    "emotion_model": "seeded:base",  # no seven-way classifier for Telugu is public: give your own
    "emotion_revision": "main",
    "emotion": "mixed",
    "parser": "none",
    "parser_model": "seeded:tiny",  # a folder with the public weights as safetensors, for --parser sddp
    "hg_dim": 512,
    "temperature": 0.5,
    "dropout": 0.1,
    "max_tokens": 256,
    "turn_tokens": 128,
    "max_turns": 32,
    "context_width": 1024,
}
TINY: Config = {
    **CONFIG,
    "encoder": "seeded:tiny",
    "pooling": "mean",
    "emotion_model": "seeded:tiny",
    "hg_dim": 64,
    "turn_tokens": 64,
    "max_turns": 16,
    "context_width": 64,
}
TRAINING: Config = {
    "lr": 3e-5,
    "weight_decay": 1e-2,
    "batch": 8,
    "epochs": 8.0,
    "warmup": 0.1,
    "scheduler": "linear",
    "history": 16,
    "valid_share": 0.15,
    "class_weights": 0.5,
    "rgat": "pyg",
    "prune": 0.0,  # attention below which a turn is no longer heard after the first epoch
    "store": "",
    "dialogues": 150,
}
FUSED: dict[str, Any] = {
    "presets": {
        "tiny": Preset(config=TINY, training={**TRAINING, "lr": 2e-3, "batch": 32, "epochs": 20.0}),
        "full": Preset(config=CONFIG, training=TRAINING),
    },
    "build": build,
    "recipe": recipe,
    "frozen": frozen,
    "resolve_config": resolve_config,
    "assets": assets,
    "tolerance": {
        "fp32": Tolerance(absolute=2e-5, relative=1e-5),
        "fp16": Tolerance(absolute=3e-2, relative=2e-2),
        "bf16": Tolerance(absolute=1e-1, relative=5e-2),
        "int8": Tolerance(absolute=2e-1, relative=5e-2),
        "int8_dynamic": Tolerance(absolute=2e-1, relative=5e-2),
    },
}


def _part(name: str, attribute: str, **own: Any) -> ModelSpec:
    def part(module: "nn.Module") -> "nn.Module":
        found: nn.Module = getattr(module, attribute)
        return found

    return ModelSpec(**FUSED, name=name, pipeline=name, checkpoint="strategy", part=part, **own)


SPECS = (
    ModelSpec(
        **FUSED,
        name="strategy",
        pipeline="strategy",
        signature=fused_signature,
        draw_inputs=fused_inputs,
        agreement=same_label,
    ),
    _part(
        "strategy_encoder", "encoder", signature=encoder_signature, draw_inputs=context_inputs, agreement=same_direction
    ),
    _part("strategy_emotion", "emotion", signature=emotion_signature, draw_inputs=turn_inputs, agreement=same_emotion),
    _part(
        "strategy_parser",
        "parser",
        signature=parser_signature,
        draw_inputs=parser_inputs,
        agreement=same_tree,
        absent=without_parser,
    ),
    _part("strategy_graph", "dialogue", signature=graph_signature, draw_inputs=graph_inputs, agreement=same_label),
)
