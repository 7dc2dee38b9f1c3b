"""The five policies as the rest of Slipway sees them. Nothing here imports torch until it is called."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from runtimes.artifact import Check
from runtimes.errors import InputError
from runtimes.pipelines.policy.melee import ACTION_COUNT, CHARACTER_COUNT, FRAME_WIDTH, HEADS, ID_COLUMNS
from runtimes.tensors import Axis, Signature, Tensors, TensorSpec
from training.spec import Config, ModelSpec, Preset, Recipe, Tolerance

if TYPE_CHECKING:
    from torch import nn

BACKBONES = ("lstm", "gru", "mamba", "attention", "jamba")
SAME_LIMIT, SAME_DECISIONS = 0.99, 200
TIME_MAX = 512  # 8.5 seconds of play: whole windows, and the rollouts that prove a carried state
AXES = (Axis(name="batch", min=1, opt=8, max=32), Axis(name="time", min=1, opt=30, max=TIME_MAX))


def signature(config: Config) -> Signature:
    """Frames and state in; logits at every position and the next state out. `InputError` for an impossible config."""
    check(config)
    state = state_specs(config)
    frames = TensorSpec(name="frames", dtype="float32", shape=("batch", "time", FRAME_WIDTH))
    logits = tuple(
        TensorSpec(name=name, dtype="float32", shape=("batch", "time", classes)) for name, classes in HEADS.items()
    )
    return Signature(
        inputs=(frames, *(_renamed(tensor, "in") for tensor in state)),
        outputs=(*logits, *(_renamed(tensor, "out") for tensor in state)),
        axes=AXES,
        state=tuple((f"{tensor.name}_in", f"{tensor.name}_out") for tensor in state),
    )


def check(config: Config) -> None:
    """`InputError` unless a policy of this config can be built."""
    if config["backbone"] not in BACKBONES:
        raise InputError(f"expected a backbone of {', '.join(BACKBONES)}; found '{config['backbone']}'")
    for name in ("hidden", "layers", "id_width", "heads"):
        if config[name] < 1:
            raise InputError(f"expected {name} of 1 or more, found {config[name]}")
    if not 0 <= config["dropout"] < 1:
        raise InputError(f"expected a dropout in 0..1, found {config['dropout']}")
    attention = _attention_layers(config)
    if attention and config["hidden"] % (2 * config["heads"]):
        raise InputError(
            f"expected hidden to be a multiple of 2 x heads = {2 * config['heads']}, found {config['hidden']}"
        )
    if attention and config["attention_window"] < 2:
        raise InputError(f"expected an attention_window of 2 or more, found {config['attention_window']}")
    if config["backbone"] == "jamba" and not 0 < attention < config["layers"]:
        raise InputError(
            f"expected a Jamba with both kinds of layers, found {attention} of {config['layers']} with attention; "
            "change layers or attention_every"
        )


def _renamed(tensor: TensorSpec, suffix: str) -> TensorSpec:
    return TensorSpec(name=f"{tensor.name}_{suffix}", dtype=tensor.dtype, shape=tensor.shape)


def state_specs(config: Config) -> tuple[TensorSpec, ...]:
    """The state a policy of this config carries, in the order its module takes it."""
    hidden, layers = config["hidden"], config["layers"]
    if config["backbone"] in ("lstm", "gru"):
        names = ("hidden", "cell") if config["backbone"] == "lstm" else ("hidden",)
        return tuple(TensorSpec(name=name, dtype="float32", shape=("batch", layers, hidden)) for name in names)
    attention = _attention_layers(config)
    past, result = config["attention_window"] - 1, []
    if mamba := layers - attention:
        result += [
            TensorSpec(name="conv", dtype="float32", shape=("batch", mamba, 2 * hidden, 3)),
            TensorSpec(name="ssm", dtype="float32", shape=("batch", mamba, 2 * hidden, 16)),
        ]
    if attention:
        cache = ("batch", attention, past, hidden)
        result += [
            TensorSpec(name="keys", dtype="float32", shape=cache),
            TensorSpec(name="values", dtype="float32", shape=cache),
            TensorSpec(name="seen", dtype="int64", shape=("batch", 1)),
        ]
    return tuple(result)


def _attention_layers(config: Config) -> int:
    if config["backbone"] == "jamba":
        return config["layers"] // max(1, config["attention_every"])
    return config["layers"] if config["backbone"] == "attention" else 0


def build(config: Config) -> "nn.Module":
    from training.models.policy.module import Policy

    check(config)
    return Policy(config)


def draw_inputs(config: Config, rng: np.random.Generator, sizes: Mapping[str, int], sample_inputs: Tensors) -> Tensors:
    """Frames [batch, time, 287]: pieces of the sample inputs's games, repeated in time where they are too short."""
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
    `same`: of all decisions, these too, SAME_LIMIT must agree; told where there are enough to speak of a share.
    """
    checks = {}
    for name in HEADS:
        if name == "buttons":
            same, margin = (got[name] > 0) == (want[name] > 0), np.abs(want[name])
        else:
            top = np.sort(want[name], -1)
            same, margin = got[name].argmax(-1) == want[name].argmax(-1), top[..., -1] - top[..., -2]
        clear = margin > 2 * (tolerance.absolute + tolerance.relative * np.abs(want[name]).max())
        same &= np.isfinite(got[name]) if name == "buttons" else np.isfinite(got[name]).all(-1)
        checks[f"clear_{name}"] = Check(value=_share(same[clear]), limit=1.0, at_least=True)
        if same.size >= SAME_DECISIONS:
            checks[f"same_{name}"] = Check(value=_share(same), limit=SAME_LIMIT, at_least=True)
    return checks


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if flags.size else 1.0


def recipe() -> type[Recipe]:
    from training.models.policy.recipe import PolicyRecipe

    return PolicyRecipe


CONFIG: Config = {
    "hidden": 256,
    "layers": 1,
    "id_width": 64,
    "previous_controller": False,
    "dropout": 0.1,
    "heads": 4,
    "attention_window": 30,
    "attention_every": 3,
}
TINY: Config = {"hidden": 64, "id_width": 8, "dropout": 0.0}
LAYERS = {"lstm": 1, "gru": 1, "mamba": 2, "attention": 2, "jamba": 6}
TRAINING: Config = {
    "lr": 3e-4,
    "batch": 64,
    "epochs": 3.0,
    "window": 30,
    "carry": 16,
    "button_weight": 2.0,
    "label_smoothing": 0.0,
    "valid_share": 0.1,
    "delay": 0,
    "patience": 5,
    "windows": "auto",
    "half_table": False,
    "games": 24,
    "frames": 1200,
}


def _spec(backbone: str) -> ModelSpec:
    full = {"backbone": backbone, **CONFIG, "layers": LAYERS[backbone]}
    tiny = {**full, **TINY, "layers": min(3, LAYERS[backbone])}
    return ModelSpec(
        name=f"policy_{backbone}",
        pipeline="policy",
        presets={
            "tiny": Preset(config=tiny, training={**TRAINING, "lr": 2e-3, "batch": 16}),
            "full": Preset(config=full, training=TRAINING),
        },
        signature=signature,
        build=build,
        draw_inputs=draw_inputs,
        agreement=agreement,
        tolerance={
            "fp32": Tolerance(absolute=2e-5, relative=1e-5),
            "fp16": Tolerance(absolute=3e-2, relative=2e-2),
            "bf16": Tolerance(absolute=2e-1, relative=1e-1),
        },
        recipe=recipe,
        fixed=("backbone",),
    )


SPECS = tuple(_spec(backbone) for backbone in BACKBONES)
