"""H-Net as the rest of Slipway sees it. Nothing here imports torch until it is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.models.hnet.arch import VOCABULARY, check
from training.models.hnet.experiments import SWEEP
from training.models.hnet.settings import CONFIG, NOTES, TINY, TRAINING
from training.spec import Config, ModelSpec, Preset, Recipe, Tolerance

if TYPE_CHECKING:
    from torch import nn

TIME_MAX = 1024  # bytes of a text, with what begins it
AXES = (Axis(name="batch", min=1, opt=4, max=16), Axis(name="time", min=1, opt=256, max=TIME_MAX))


def signature(config: Config) -> Signature:
    """Bytes and lengths in; logits, and p and b of every stage out. `InputError` for an impossible config."""
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
        ),
        axes=AXES,
    )


def build(config: Config) -> "nn.Module":
    from training.models.hnet.module import HNetForCausalLM

    return HNetForCausalLM(config)


def feeds(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], probe: Tensors) -> Tensors:
    """Texts of different lengths, the longest of all `time` bytes: pieces of the probe, or Telugu letters."""
    batch, time = sizes["batch"], sizes["time"]
    if "byte_ids" in probe:
        text = probe["byte_ids"].reshape(-1)
        starts = rng.integers(0, len(text), batch)
        ids = text[(starts[:, None] + np.arange(time)) % len(text)].astype(np.int64)
    else:
        letters = rng.integers(0x0C05, 0x0C39, (batch, time // 3 + 1))
        spelled = [np.frombuffer("".join(map(chr, row)).encode()[:time], np.uint8) for row in letters]
        ids = np.stack(spelled).astype(np.int64)
    lengths = rng.integers(max(1, time // 2), time + 1, batch)
    lengths[0] = time
    return {"byte_ids": ids, "lengths": lengths.astype(np.int64)}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """`boundaries`: share of positions at which both begin the same segments."""
    same = (got["boundary"] == want["boundary"]).all(-1)
    return {"boundaries": Check(value=float(same.mean()), limit=1.0, at_least=True)}


def recipe() -> type[Recipe]:
    from training.models.hnet.recipe import HNetRecipe

    return HNetRecipe


SPECS = (
    ModelSpec(
        name="hnet",
        pipeline="hnet",
        presets={
            "tiny": Preset(
                config={**CONFIG, **TINY},
                training={**TRAINING, "lr": 2e-3, "batch": 16, "epochs": 3.0, "max_bytes": 256},
            ),
            "full": Preset(config=CONFIG, training=TRAINING),
        },
        signature=signature,
        build=build,
        feeds=feeds,
        agreement=agreement,
        tolerance={"fp32": Tolerance(absolute=1e-4, relative=1e-4)},
        recipe=recipe,
        notes=NOTES,
        sweep=SWEEP,
        skips={"vllm": "reads bytes and divides them itself: no tokenizer, and a state that vLLM cannot page"},
    ),
)
