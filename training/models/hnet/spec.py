"""The declaration of H-Net. Nothing here imports torch until it is called."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.tensors import Signature, Tensors, TensorSpec
from training.config import Config
from training.models.hnet.agreement import agreement, mask_near_ties
from training.models.hnet.arch import VOCABULARY, check, integer_states, is_ring, state_shapes
from training.models.hnet.settings import AXES, CONFIG, TIME_MAX, TINY
from training.spec import Export, Interface, ModelSpec, Parity, Tolerance

if TYPE_CHECKING:
    from torch import nn

PARITY_ROWS = 4  # of a batch


def signature(config: Config) -> Signature:
    """Bytes and lengths in; logits, p and b of every stage, and the cost of each byte out.

    `nats` of a byte given those before it: 0 for the first, which has no prediction, and for padding. `text_bytes` are
    the bytes again, -1 for padding. `InputError` for an impossible config.
    """
    arch, _ = check(config)
    decisions = ("batch", "time", arch.stages)
    return Signature(
        inputs=(
            TensorSpec(name="byte_ids", dtype="int64", shape=("batch", "time")),
            TensorSpec(name="lengths", dtype="int64", shape=("batch",)),
        ),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", "time", VOCABULARY)),
            TensorSpec(name="boundary_prob", dtype="float32", shape=decisions),
            TensorSpec(name="boundary", dtype="bool", shape=decisions),
            TensorSpec(name="nats", dtype="float32", shape=("batch", "time")),
            TensorSpec(name="text_bytes", dtype="int64", shape=("batch", "time")),
        ),
        axes=AXES,
    )


def step_signature(config: Config) -> Signature:
    """One byte of every row and the state in; logits, p and b of every stage, and the next state out."""
    arch, _ = check(config)
    integers = integer_states(config)

    def state(suffix: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=f"{name}_{suffix}", dtype="int64" if name in integers else "float32", shape=("batch", *shape)
            )
            for name, shape in state_shapes(config).items()
        )

    return Signature(
        inputs=(TensorSpec(name="byte_ids", dtype="int64", shape=("batch", 1)), *state("in")),
        outputs=(
            TensorSpec(name="logits", dtype="float32", shape=("batch", 1, VOCABULARY)),
            TensorSpec(name="boundary_prob", dtype="float32", shape=("batch", 1, arch.stages)),
            TensorSpec(name="boundary", dtype="bool", shape=("batch", 1, arch.stages)),
            *state("out"),
        ),
        axes=AXES[:1],
        state=tuple((f"{name}_in", f"{name}_out") for name in state_shapes(config)),
        in_place=tuple(f"{name}_in" for name in state_shapes(config) if is_ring(name)),
    )


def build(config: Config) -> "nn.Module":
    from training.models.hnet.module import HNetForCausalLM

    return HNetForCausalLM(config)


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Texts of different lengths, the longest of all `time` bytes: pieces of the sample inputs, or Telugu letters."""
    batch, time = sizes["batch"], sizes["time"]
    if "byte_ids" in sample_inputs:
        text = sample_inputs["byte_ids"].reshape(-1)
        starts = rng.integers(0, len(text), batch)
        ids = text[(starts[:, None] + np.arange(time)) % len(text)].astype(np.int64)
    else:
        letters = rng.integers(0x0C05, 0x0C39, (batch, time // 3 + 1))
        spelled = [np.frombuffer("".join(map(chr, row)).encode()[:time], np.uint8) for row in letters]
        ids = np.stack(spelled).astype(np.int64)
    lengths = rng.integers(max(1, time // 2), time + 1, batch)
    lengths[0] = time
    return {"byte_ids": ids, "lengths": lengths.astype(np.int64)}


def step_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """The bytes of `draw_inputs`, one of each row unless `sizes` has a longer time."""
    return {"byte_ids": draw_inputs(config, rng, {"time": 1, **sizes}, sample_inputs)["byte_ids"]}


def parity_inputs(config: Config, sample_inputs: Tensors) -> Iterator[Tensors]:
    """The held-out texts of the sample inputs, whole."""
    ids = sample_inputs.get("byte_ids", np.zeros((0, 0)))[:, :TIME_MAX].astype(np.int64)
    for start in range(0, len(ids), PARITY_ROWS):
        rows = ids[start : start + PARITY_ROWS]
        yield {"byte_ids": rows, "lengths": np.full(len(rows), rows.shape[1])}


def scorer(module: "nn.Module") -> "nn.Module":
    from training.models.hnet.module import HNetForCausalLM
    from training.models.hnet.serving import HNetScorer

    assert isinstance(module, HNetForCausalLM)
    return HNetScorer(module)


def step(module: "nn.Module") -> "nn.Module":
    from training.models.hnet.module import HNetForCausalLM
    from training.models.hnet.serving import HNetStep

    assert isinstance(module, HNetForCausalLM)
    return HNetStep(module)


def whole_texts(module: "nn.Module", inputs: Tensors) -> Tensors:
    """Logits, p and b of whole texts, by the forward pass over a whole text."""
    import torch

    from training.models.hnet.serving import HNetStep

    assert isinstance(module, HNetStep)
    printed = module.whole(torch.from_numpy(inputs["byte_ids"]))
    return {name: tensor.numpy() for name, tensor in zip(("logits", "boundary_prob", "boundary"), printed, strict=True)}


SKIPS = {"vllm": "the model reads bytes without a tokenizer, and vLLM cannot page its recurrent state"}
PRESETS = {"tiny": {**CONFIG, **TINY}, "full": CONFIG}
TOLERANCE = {"fp32": Tolerance(absolute=1e-4, relative=1e-4)}
SPECS = (
    ModelSpec(
        name="hnet",
        pipeline="hnet",
        presets=PRESETS,
        interface=Interface(signature=signature, build=build, wrap=scorer),
        parity=Parity(
            draw_inputs=draw_inputs,
            parity_inputs=parity_inputs,
            agreement=agreement,
            mask_near_ties=mask_near_ties,
            tolerance=TOLERANCE,
        ),
        export=Export(skips=SKIPS),
        training_path="training.models.hnet.training:TRAINING",
    ),
    ModelSpec(
        name="hnet_step",
        pipeline="hnet_step",
        parent="hnet",
        presets=PRESETS,
        interface=Interface(signature=step_signature, build=build, part=step),
        parity=Parity(
            draw_inputs=step_inputs,
            sequence=whole_texts,
            agreement=agreement,
            mask_near_ties=mask_near_ties,
            tolerance=TOLERANCE,
        ),
        export=Export(skips=SKIPS),
    ),
)
