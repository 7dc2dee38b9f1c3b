"""The declarations of `strategy` and its parts. Nothing here imports torch until it is called.

strategy          texts in: all parts below in one model, for callers without a cache
strategy_encoder  the frozen context encoder, whose output is cached by content
strategy_emotion  the frozen emotion classifier, whose output is cached by content
strategy_parser   the frozen discourse parser, if the model was trained with one; its output is cached by content
strategy_graph    the trained part
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from runtimes.artifact import Check
from runtimes.pipelines.strategy.dialogue import ROOT
from runtimes.tensors import Signature, Tensors
from training.agreement import clear_choices, smallest_cosine
from training.config import Config
from training.models.strategy.inputs import context_inputs, fused_inputs, graph_inputs, parser_inputs, turn_inputs
from training.models.strategy.settings import CONFIG, TINY
from training.models.strategy.signature import (
    check,
    emotion_signature,
    encoder_signature,
    fused_signature,
    graph_signature,
    parser_signature,
)
from training.spec import Frozen, Interface, ModelSpec, Parity, Tolerance

if TYPE_CHECKING:
    from torch import nn


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
    """The tokenizers, and the identities of the frozen parts in a store."""
    from training.models.strategy.identities import identities, tokenizers

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
    return None if config["parser"] == "sddp" else "trained without a parser; train strategy with --parser sddp"


def same_label(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Share of dialogues with the original's strategy, near-ties of the original excepted."""
    return {"same_label": clear_choices(got["logits"], want["logits"], tolerance)}


def same_emotion(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Share of turns with the original's emotion, near-ties of the original excepted."""
    return {"same_label": clear_choices(got["turn_emotion"], want["turn_emotion"], tolerance)}


def same_tree(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Share of pairs with the original's relation, near-ties of the original excepted."""
    return {"same_label": clear_choices(got["pair_scores"][..., :ROOT], want["pair_scores"][..., :ROOT], tolerance)}


def same_direction(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """The smallest cosine between a vector and the original's."""
    cosine = smallest_cosine(got["context_vector"], want["context_vector"])
    return {"cosine": Check(value=cosine, limit=1 - 10 * tolerance.absolute**2 - 1e-6, at_least=True)}


PRESETS = {"tiny": TINY, "full": CONFIG}
TOLERANCE = {
    "fp32": Tolerance(absolute=2e-5, relative=1e-5),
    "fp16": Tolerance(absolute=3e-2, relative=2e-2),
    "bf16": Tolerance(absolute=1e-1, relative=5e-2),
    "int8": Tolerance(absolute=2e-1, relative=5e-2),
    "int8_dynamic": Tolerance(absolute=2e-1, relative=5e-2),
}


def _interface(
    signature: Callable[[Config], Signature],
    part: str = "",
    absent: Callable[[Config], str | None] = lambda config: None,
) -> Interface:
    """The interface of the whole, or of the part in this attribute of it."""

    def attribute(module: "nn.Module") -> "nn.Module":
        found: nn.Module = getattr(module, part) if part else module
        return found

    return Interface(
        signature=signature,
        build=build,
        part=attribute,
        frozen=frozen,
        resolve_config=resolve_config,
        assets=assets,
        absent=absent,
    )


def _part(name: str, interface: Interface, parity: Parity) -> ModelSpec:
    return ModelSpec(name=name, pipeline=name, parent="strategy", presets=PRESETS, interface=interface, parity=parity)


SPECS = (
    ModelSpec(
        name="strategy",
        pipeline="strategy",
        presets=PRESETS,
        interface=_interface(fused_signature),
        parity=Parity(draw_inputs=fused_inputs, agreement=same_label, tolerance=TOLERANCE),
        training_path="training.models.strategy.training:TRAINING",
    ),
    _part(
        "strategy_encoder",
        _interface(encoder_signature, "encoder"),
        Parity(draw_inputs=context_inputs, agreement=same_direction, tolerance=TOLERANCE),
    ),
    _part(
        "strategy_emotion",
        _interface(emotion_signature, "emotion"),
        Parity(draw_inputs=turn_inputs, agreement=same_emotion, tolerance=TOLERANCE),
    ),
    _part(
        "strategy_parser",
        _interface(parser_signature, "parser", without_parser),
        Parity(draw_inputs=parser_inputs, agreement=same_tree, tolerance=TOLERANCE),
    ),
    _part(
        "strategy_graph",
        _interface(graph_signature, "dialogue"),
        Parity(draw_inputs=graph_inputs, agreement=same_label, tolerance=TOLERANCE),
    ),
)
