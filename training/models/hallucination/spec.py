"""The declarations of the four hallucination models. Nothing here imports torch until it is called.

hallucination            tokens in: the features of a frozen decoder and the scorer's result, fused
hallucination_scorer     the scorer over given features, such as those of a public score log
hallucination_generator  the frozen decoder alone, as the language model that wrote the answers
hallucination_aarf       the frozen decoder as a generator, each token scored and reweighted where the score is high
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.config import Config
from training.models.hallucination import aarf_spec, generator_spec
from training.models.hallucination.settings import (
    CONFIG,
    SCORER,
    TINY,
    check,
    heads_of,
    layers_of,
    resolve_config,
)
from training.spec import Export, Frozen, Interface, ModelSpec, Parity, Tolerance

if TYPE_CHECKING:
    from torch import nn

BYTE_IDS = (4, 260)  # ids that are neither special nor beyond the smallest vocabulary
# A conversion need not reproduce a choice of a head that is a near-tie.
NEAR_TIE = 1.0  # times the relative tolerance
MOST_NEAR_TIES = 0.05  # of all choices, in fp32; other precisions only report their share


def signature(config: Config) -> Signature:
    """A tokenized answer in its context in; features, scores and the spans they belong to out."""
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
    from training.models.hallucination.module import build_detector

    check(config)
    return build_detector(config)


def build_scorer(config: Config) -> "nn.Module":
    from training.models.hallucination.module import ScorerAlone

    return ScorerAlone(config)


def assets(config: Config) -> Mapping[str, bytes]:
    from training.models.hallucination.frozen import assets

    return assets(config)


def frozen(config: Config) -> tuple[Frozen, ...]:
    base = Frozen(prefix="base", source=config["base"], revision=config["base_revision"])
    encoder = Frozen(prefix="encoder", source=config["encoder"], revision=config["encoder_revision"])
    return (base, encoder) if config["level"] == "chunk" else (base,)


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Sample or random token ids with new spans: a prompt, and an answer in chunks, the last of them padding."""
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
    """The answers of the sample inputs, in single rows."""
    for i in range(len(sample_inputs["token_ids"])):
        yield {name: values[i : i + 1] for name, values in sample_inputs.items()}


def _spans(start: int, end: int, count: int) -> np.ndarray:
    """[count, 2]: pieces of like length, or of one place and then empty ones where there are too few."""
    edges = np.linspace(start, end, min(count, end - start) + 1).astype(int)
    spans = np.zeros((count, 2), int)
    spans[: len(edges) - 1] = np.stack([edges[:-1], edges[1:]], -1)
    return spans


def _ids(rng: np.random.Generator, shape: tuple[int, ...], real: np.ndarray | None) -> np.ndarray:
    """Token ids: pieces of real rows without their padding; repeated where they are too short."""
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
    """`got` with the original's numbers where a head's choice in the original is a near-tie.

    `agreement` limits the share of near-ties. Scores are computed from these features; they are compared unchanged for
    chunks without a near-tie. NaN is never masked.
    """
    close = want["gaps"] <= _near(tolerance)
    clear_BC, clear_B = ~close.any(-1), ~close.any((-1, -2))
    keep = {
        "ecs": ~close,
        "gaps": np.zeros_like(close),  # a difference of two close numbers; the choice it decides is compared
        "scores": clear_BC,
        "response_score": clear_B,
    }
    return {
        name: np.where(keep[name] | ~np.isfinite(values), values, want[name]) if name in keep else values
        for name, values in got.items()
    }


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Rank order of the scores of chunks without a near-tie, and the share of choices that are near-ties."""
    close = want["gaps"] <= _near(tolerance)
    clear_BC = ~close.any(-1)
    exact = tolerance.relative <= 1e-4
    return {
        "same_order": same_order(got["scores"][clear_BC], want["scores"][clear_BC], tolerance),
        "near_ties": Check(value=float(close.mean()), limit=MOST_NEAR_TIES if exact else 1.0),
    }


def same_order(got: np.ndarray, want: np.ndarray, tolerance: Tolerance) -> Check:
    """Of the pairs that the original ranks by more than the tolerance, the share that `got` ranks the same."""
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


TOLERANCE = {
    "fp32": Tolerance(absolute=2e-5, relative=1e-5),
    "fp16": Tolerance(absolute=5e-2, relative=2e-2),
    "bf16": Tolerance(absolute=2e-1, relative=5e-2),
    "int8": Tolerance(absolute=2e-1, relative=5e-2),
    "int8_dynamic": Tolerance(absolute=2e-1, relative=5e-2),
}
DETECTOR = {"tiny": TINY, "full": CONFIG}
SPECS = (
    ModelSpec(
        name="hallucination",
        pipeline="hallucination",
        presets=DETECTOR,
        interface=Interface(
            signature=signature, build=build, frozen=frozen, resolve_config=resolve_config, assets=assets
        ),
        parity=Parity(draw_inputs=draw_inputs, agreement=agreement, mask_near_ties=mask_near_ties, tolerance=TOLERANCE),
        export=Export(
            fp32_modules=("encoder", "scorer"),
            calibration=calibration,
            skips={
                "vllm": "vLLM does not expose the attention that the scores need; for the decoder alone export "
                "hallucination_generator"
            },
        ),
        training_path="training.models.hallucination.training:DETECTOR",
    ),
    ModelSpec(
        name="hallucination_scorer",
        pipeline="hallucination_scorer",
        presets={"tiny": {**SCORER, "max_batch": 512, "max_chunks": 32}},
        interface=Interface(signature=scorer_signature, build=build_scorer),
        parity=Parity(
            draw_inputs=scorer_inputs,
            agreement=scorer_agreement,
            tolerance={"fp32": Tolerance(absolute=2e-5, relative=1e-5)},
        ),
        training_path="training.models.hallucination.training:SCORER",
    ),
    ModelSpec(
        name="hallucination_generator",
        pipeline="hallucination_generator",
        parent="hallucination",
        presets=DETECTOR,
        interface=Interface(
            signature=generator_spec.signature,
            build=build,
            part=generator_spec.part,
            frozen=frozen,
            resolve_config=resolve_config,
        ),
        parity=generator_spec.PARITY,
        export=generator_spec.EXPORT,
    ),
    ModelSpec(
        name="hallucination_aarf",
        pipeline="hallucination_aarf",
        parent="hallucination",
        presets=DETECTOR,
        interface=Interface(
            signature=aarf_spec.signature,
            build=build,
            part=aarf_spec.part,
            frozen=frozen,
            resolve_config=resolve_config,
            assets=assets,
        ),
        parity=Parity(
            draw_inputs=aarf_spec.draw_inputs,
            mask_near_ties=aarf_spec.mask_near_ties,
            agreement=aarf_spec.agreement,
            tolerance={name: TOLERANCE[name] for name in ("fp32", "fp16", "bf16")},
        ),
        export=aarf_spec.EXPORT,
    ),
)
