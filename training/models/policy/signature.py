"""The tensors of a policy: frames, logits and the state that it carries."""

from runtimes.errors import InputError
from runtimes.pipelines.policy.melee import FRAME_WIDTH, HEADS
from runtimes.tensors import Signature, TensorSpec
from training.config import Config
from training.models.policy.settings import AXES, BACKBONES


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
