"""The declaration of `hallucination_aarf`, a step of generation with AARF. No torch is imported until it is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.config import Config
from training.models.hallucination.settings import heads_of, layers_of
from training.spec import Export, Tolerance

if TYPE_CHECKING:
    from torch import nn

BYTE_IDS = (4, 260)  # ids that are neither special nor beyond the smallest vocabulary
MOST_NEAR_TIES = 0.05  # of all choices of a head, in fp32


def signature(config: Config) -> Signature:
    """New tokens and the past in; logits, ECS and PKS, and the keys, values and states of the new tokens out."""
    from training.models.hallucination.frozen import decoder_config

    base = decoder_config(config["base"], config["base_revision"])
    layers, heads, width = base.num_hidden_layers, base.num_attention_heads, base.hidden_size
    head_width = getattr(base, "head_dim", None) or width // heads
    kept = ("batch", layers, base.num_key_value_heads)
    past = (("keys", (*kept, "past", head_width)), ("values", (*kept, "past", head_width)))
    new = (("new_keys", (*kept, "tokens", head_width)), ("new_values", (*kept, "tokens", head_width)))
    scored = len(heads_of(config))
    inputs = (
        TensorSpec(name="token_ids", dtype="int64", shape=("batch", "tokens")),
        *_floats(*past, ("finals", ("batch", "past", width))),
        TensorSpec(name="prompt_range", dtype="int64", shape=("batch", 2)),
        *_floats(("attend", ("batch", layers, heads)), ("know", ("batch", layers))),
    )
    outputs = _floats(
        ("logits", ("batch", base.vocab_size)),
        ("ecs", ("batch", scored)),
        ("pks", ("batch", len(layers_of(config)))),
        ("gaps", ("batch", scored)),
        *new,
        ("new_finals", ("batch", "tokens", width)),
    )
    longest = config["max_tokens"]
    axes = (
        Axis(name="batch", min=1, opt=2, max=config["max_batch"]),
        Axis(name="tokens", min=1, opt=max(2, longest // 3), max=longest),
        Axis(name="past", min=1, opt=max(2, longest // 4), max=longest),
    )
    return Signature(inputs=inputs, outputs=outputs, axes=axes)


def _floats(*named: tuple[str, tuple[int | str, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name, shape in named)


def part(module: "nn.Module") -> "nn.Module":
    from training.models.hallucination.aarf import MitigatedDecoder

    return MitigatedDecoder(module)  # type: ignore[arg-type]


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Tokens of the sample inputs or made-up ones behind a made-up past; half of the rows are reweighted."""
    shapes = {tensor.name: tensor.resolve(sizes) for tensor in signature(config).inputs}
    ids = rng.integers(*BYTE_IDS, shapes["token_ids"])
    if "token_ids" in sample_inputs:
        ids = np.stack([np.resize(rng.permutation(sample_inputs["token_ids"])[0], ids.shape[1]) for _ in ids])
    known = sizes["past"] - 1 + sizes["tokens"]
    start = int(rng.integers(0, max(1, known // 4)))
    again = rng.random(shapes["attend"]) < 0.3
    less = rng.random(shapes["know"]) < 0.3
    again[::2], less[::2] = False, False
    made = {name: rng.normal(size=shapes[name]) for name in ("keys", "values", "finals")}
    factors = {"attend": np.where(again, 5.0, 1.0), "know": np.where(less, 0.2, 1.0)}
    return {
        "token_ids": ids.astype(np.int64),
        "prompt_range": np.tile(np.array([start, known], np.int64), (sizes["batch"], 1)),
        **{name: array.astype(np.float32) for name, array in {**made, **factors}.items()},
    }


def mask_near_ties(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """`got` with the original's ECS where a head's choice is a near-tie; `agreement` limits the share of these."""
    near = want["gaps"] <= tolerance.relative
    ecs = np.where(near & np.isfinite(got["ecs"]), want["ecs"], got["ecs"])
    gaps = np.where(np.isfinite(got["gaps"]), want["gaps"], got["gaps"])  # the choices they decide are compared
    return {**got, "ecs": ecs, "gaps": gaps}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """The likeliest token is the original's, or as likely in the original; few choices of heads are near-ties."""
    picked = np.take_along_axis(want["logits"], got["logits"].argmax(-1)[:, None], -1)[:, 0]
    best = want["logits"].max(-1)
    allowed = 2 * (tolerance.absolute + tolerance.relative * np.abs(best))
    near = float((want["gaps"] <= tolerance.relative).mean())
    exact = tolerance.relative <= 1e-4
    return {
        "same_token": Check(value=float((picked >= best - allowed).mean()), limit=1.0, at_least=True),
        "near_ties": Check(value=near, limit=MOST_NEAR_TIES if exact else 1.0),
    }


EXPORT = Export(
    skips={
        **dict.fromkeys(("onnx", "openvino", "tensorrt"), "AARF is an option of the torch runtime: --target torch"),
        "vllm": "vLLM exposes no attention and cannot reweight heads: --target torch",
    }
)
