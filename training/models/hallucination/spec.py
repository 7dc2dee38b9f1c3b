"""`hallucination` as the rest of Slipway sees it. Nothing here imports torch until it is called.

hallucination         tokens in: the features of a frozen decoder and the scorer's verdict, fused
hallucination_scorer  the scorer over features that are known already, such as those of a public score log
hallucination_generator  the frozen decoder alone, as the language model that wrote the answers
hallucination_aarf    the same token by token, scored and, where the score is high, reweighted
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.pipelines.hallucination.detector import ENCODER_TOKENIZER
from runtimes.pipelines.hallucination.grounding import TEMPLATE, TOKENIZER
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.models.hallucination import generator, mitigated
from training.models.hallucination.config import (
    CONFIG,
    SCORER,
    TINY,
    TRAINING,
    check,
    heads_of,
    layers_of,
    resolve_config,
)
from training.spec import Config, Frozen, ModelSpec, Preset, Recipe, Tolerance

if TYPE_CHECKING:
    from torch import nn

BYTE_IDS = (4, 260)  # ids that are neither special nor beyond the smallest vocabulary
# A near-tie between two choices of a head is none that a conversion can be held to.
NEAR_TIE = 1.0  # times the relative tolerance
MOST_NEAR_TIES = 0.05  # of all choices, in fp32; other precisions say how many there were


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


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Sample token ids, or made-up ones, cut anew: a prompt, an answer in chunks, the last of them padding."""
    batch, tokens, rows, count = (sizes[name] for name in ("batch", "tokens", "rows", "chunks"))
    answer = min(rows, tokens // 2)
    middle = tokens - answer
    first = int(rng.integers(0, max(1, middle // 4)))
    places = np.minimum(np.arange(rows), answer - 1) + middle - 1
    spans = _spans(0, answer, count)
    if count > 2:
        spans[-1] = 0
    result = {
        "token_ids": _ids(rng, (batch, tokens), sample_inputs.get("token_ids")),
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
            result[name] = _ids(rng, (batch, chunks, length), sample_inputs.get(name))
    return {name: values.astype(np.int64) for name, values in result.items()}


def calibration(config: Config, sample_inputs: Tensors) -> Iterator[Tensors]:
    """The answers of the sample inputs, one by one."""
    for i in range(len(sample_inputs["token_ids"])):
        yield {name: values[i : i + 1] for name, values in sample_inputs.items()}


def _spans(start: int, end: int, count: int) -> np.ndarray:
    """[count, 2]: pieces of like length, or of one place and then empty ones where there are too few."""
    edges = np.linspace(start, end, min(count, end - start) + 1).astype(int)
    spans = np.zeros((count, 2), int)
    spans[: len(edges) - 1] = np.stack([edges[:-1], edges[1:]], -1)
    return spans


def _ids(rng: np.random.Generator, shape: tuple[int, ...], real: np.ndarray | None) -> np.ndarray:
    """Token ids: pieces of real rows without their padding, which is all alike; repeated where they are too short."""
    if real is None:
        return rng.integers(*BYTE_IDS, shape)
    rows = real.reshape(-1, real.shape[-1])
    differs = rows != rows[:, -1:]
    lengths = np.where(differs.any(1), rows.shape[1] - differs[:, ::-1].argmax(1), 0)
    if not lengths.any():
        lengths[:] = rows.shape[1]
    chosen = rng.choice(np.flatnonzero(lengths), shape[:-1])
    offsets = rng.integers(0, lengths[chosen])
    places = (np.arange(shape[-1]) + offsets[..., None]) % lengths[chosen][..., None]
    return np.take_along_axis(rows[chosen], places, -1)


def scorer_inputs(
    config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors
) -> Tensors:
    """Features of the sample inputs, or made-up ones; the last chunk of the last row is padding."""
    shape = sizes["batch"], sizes["chunks"]
    result = {}
    for name, width in (("ecs", len(heads_of(config))), ("pks", len(layers_of(config)))):
        made = rng.random((*shape, width))
        if name in sample_inputs:
            rows = sample_inputs[name].reshape(-1, width)
            made = rows[rng.integers(0, len(rows), shape)]
        result[name] = made.astype(np.float32)
    lengths = rng.integers(1, 200, shape)
    if shape[1] > 1:
        lengths[-1, -1] = 0
    return {**result, "lengths": lengths.astype(np.int64)}


def mask_near_ties(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """`got` with the original's numbers where a head's choice hung on less than the precision: parity is blind there.

    How much that is, `agreement` limits. Scores are then the scorer's over those features and stay as they were said:
    they are compared in full wherever no choice was so close. NaN is never put aside.
    """
    close = want["gaps"] <= _near(tolerance)
    clear_BC, clear_B = ~close.any(-1), ~close.any((-1, -2))
    keep = {
        "ecs": ~close,
        "gaps": np.zeros_like(close),  # a difference of two numbers that are close; compared by what it decides
        "scores": clear_BC,
        "response_score": clear_B,
    }
    return {
        name: np.where(keep[name] | ~np.isfinite(values), values, want[name]) if name in keep else values
        for name, values in got.items()
    }


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


def implied(config: Config, training: Config) -> Config:
    """The settings with what their profile says."""
    if not training["profile"]:
        return training
    from training.models.hallucination.loading import with_profile

    return with_profile(training, config)


def recipe() -> type[Recipe]:
    from training.models.hallucination.recipe import HallucinationRecipe

    return HallucinationRecipe


def scorer_recipe() -> type[Recipe]:
    from training.models.hallucination.recipe import ScorerRecipe

    return ScorerRecipe


TOLERANCE = {
    "fp32": Tolerance(absolute=2e-5, relative=1e-5),
    "fp16": Tolerance(absolute=5e-2, relative=2e-2),
    "bf16": Tolerance(absolute=2e-1, relative=5e-2),
    "int8": Tolerance(absolute=2e-1, relative=5e-2),
    "int8_dynamic": Tolerance(absolute=2e-1, relative=5e-2),
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
        draw_inputs=draw_inputs,
        agreement=agreement,
        mask_near_ties=mask_near_ties,
        exact=("encoder", "scorer"),
        calibration=calibration,
        tolerance=TOLERANCE,
        recipe=recipe,
        frozen=frozen,
        resolve_config=resolve_config,
        implied=implied,
        assets=assets,
        skips={"vllm": "serves a generator, not what reads its attention: --model hallucination_generator"},
    ),
    ModelSpec(
        name="hallucination_scorer",
        pipeline="hallucination_scorer",
        presets={"tiny": Preset(config={**SCORER, "max_batch": 512, "max_chunks": 32}, training=TRAINING)},
        signature=scorer_signature,
        build=build_scorer,
        draw_inputs=scorer_inputs,
        agreement=scorer_agreement,
        tolerance={"fp32": Tolerance(absolute=2e-5, relative=1e-5)},
        recipe=scorer_recipe,
    ),
    ModelSpec(
        name="hallucination_generator",
        pipeline="hallucination_generator",
        checkpoint="hallucination",
        part=generator.part,
        presets={"tiny": Preset(config=TINY, training=TRAINING), "full": Preset(config=CONFIG, training=TRAINING)},
        signature=generator.signature,
        build=build,
        draw_inputs=generator.draw_inputs,
        parity_inputs=generator.parity_inputs,
        mask_near_ties=generator.mask_near_ties,
        agreement=generator.agreement,
        tolerance=generator.TOLERANCE,
        recipe=recipe,
        frozen=frozen,
        resolve_config=resolve_config,
        skips=dict.fromkeys(
            ("onnx", "openvino", "tensorrt", "torch"), "a generator runs where keys are cached: --target vllm"
        ),
        language_model=generator.language_model,
    ),
    ModelSpec(
        name="hallucination_aarf",
        pipeline="hallucination_aarf",
        checkpoint="hallucination",
        part=mitigated.part,
        presets={"tiny": Preset(config=TINY, training=TRAINING), "full": Preset(config=CONFIG, training=TRAINING)},
        signature=mitigated.signature,
        build=build,
        draw_inputs=mitigated.draw_inputs,
        mask_near_ties=mitigated.mask_near_ties,
        agreement=mitigated.agreement,
        tolerance={name: TOLERANCE[name] for name in ("fp32", "fp16", "bf16")},
        recipe=recipe,
        frozen=frozen,
        resolve_config=resolve_config,
        assets=assets,
        skips={
            **dict.fromkeys(("onnx", "openvino", "tensorrt"), "AARF is an option of the torch runtime: --target torch"),
            "vllm": "its engine shows no attention and reweights no heads: --target torch",
        },
    ),
)
