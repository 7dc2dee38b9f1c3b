"""The declarations of the five policies. Nothing here imports torch until it is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.pipelines.policy.melee import ACTION_COUNT, CHARACTER_COUNT, HEADS, ID_COLUMNS
from runtimes.tensors import Tensors
from training.agreement import choice_margins, is_clear, same_choices, share
from training.config import Config
from training.models.policy.settings import BACKBONES, CONFIG, LAYERS, TINY
from training.models.policy.signature import check, signature
from training.spec import Interface, ModelSpec, Parity, Tolerance

if TYPE_CHECKING:
    from torch import nn

SAME_LIMIT, SAME_DECISIONS = 0.99, 200


def build(config: Config) -> "nn.Module":
    from training.models.policy.module import Policy

    check(config)
    return Policy(config)


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Frames [batch, time, 287]: pieces of the sample games, repeated in time where they are too short."""
    batch, time = sizes["batch"], sizes["time"]
    if "frames" not in sample_inputs:
        numbers = rng.normal(0, 0.5, (batch, time, ID_COLUMNS))
        actions = rng.integers(0, ACTION_COUNT, (batch, time, 2))
        characters = rng.integers(0, CHARACTER_COUNT, (batch, time, 2))
        return {"frames": np.concatenate([numbers, actions, characters], -1).astype(np.float32)}
    games = sample_inputs["frames"].astype(np.float32)
    rows = rng.integers(0, len(games), batch)
    starts = rng.integers(0, max(1, games.shape[1] - time + 1), batch)
    places = (starts[:, None] + np.arange(time)) % games.shape[1]
    return {"frames": games[rows[:, None], places]}


def agreement(got: Tensors, want: Tensors, tolerance: Tolerance) -> dict[str, Check]:
    """Share of decisions in which each head agrees with the original; a button is decided by its sign.

    `clear`: all must agree but those whose two best logits lie closer than twice the tolerance, where rounding decides.
    `same`: of all decisions, including these, SAME_LIMIT must agree; omitted for fewer than SAME_DECISIONS decisions.
    """
    checks = {}
    for name in HEADS:
        if name == "buttons":
            same = ((got[name] > 0) == (want[name] > 0)) & np.isfinite(got[name])
            margins = np.abs(want[name])
        else:
            same, margins = same_choices(got[name], want[name]), choice_margins(want[name])
        clear = is_clear(margins, want[name], tolerance)
        checks[f"clear_{name}"] = Check(value=share(same[clear]), limit=1.0, at_least=True)
        if same.size >= SAME_DECISIONS:
            checks[f"same_{name}"] = Check(value=share(same), limit=SAME_LIMIT, at_least=True)
    return checks


INTERFACE = Interface(signature=signature, build=build, fixed=("backbone",))
PARITY = Parity(
    draw_inputs=draw_inputs,
    agreement=agreement,
    tolerance={
        "fp32": Tolerance(absolute=2e-5, relative=1e-5),
        "fp16": Tolerance(absolute=3e-2, relative=2e-2),
        "bf16": Tolerance(absolute=2e-1, relative=1e-1),
    },
)


def _spec(backbone: str) -> ModelSpec:
    full = {"backbone": backbone, **CONFIG, "layers": LAYERS[backbone]}
    return ModelSpec(
        name=f"policy_{backbone}",
        pipeline="policy",
        presets={"tiny": {**full, **TINY, "layers": min(3, LAYERS[backbone])}, "full": full},
        interface=INTERFACE,
        parity=PARITY,
        training_path="training.models.policy.training:TRAINING",
    )


SPECS = tuple(_spec(backbone) for backbone in BACKBONES)
