"""The notation of an H-Net's architecture, its derived sizes, and the state of its layers. Nothing here imports torch.

`m2 T4` is an encoder and a decoder of two Mamba-2 layers around four Transformer layers; every further word is one
stage deeper, `m4 T1m4 T26`. A decoder is its encoder mirrored. The nested form of the public checkpoints,
`["m4", ["T1m4", ["T26"], "m4T1"], "m4"]`, is read as well. m is Mamba-2, t attention; a capital is followed by an MLP.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from runtimes.errors import InputError

VOCABULARY = 256
HEAD, ROTARY, TAPS = 64, 32, 4  # width of a head, rotated dimensions of it, taps of a convolution
EXAMPLE = "'m2 T4', 'm4 T1m4 T26'"

StateShapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arch:
    """Layers by letter (m, M, t, T) of every stage, the outermost first.

    `encoders` and `decoders` have one entry for every stage but the innermost, whose layers are `main`.
    """

    encoders: tuple[str, ...]
    main: str
    decoders: tuple[str, ...]

    @property
    def stages(self) -> int:
        """How many times the text is divided into segments; 0 is a model without segments."""
        return len(self.encoders)

    @property
    def inner(self) -> "Arch":
        """The part between the outermost encoder and decoder."""
        return Arch(encoders=self.encoders[1:], main=self.main, decoders=self.decoders[1:])


def parse_arch(text: str) -> Arch:
    """The architecture that `text` writes; `InputError` for one that cannot be read."""
    if text.lstrip().startswith("["):
        return _nested(_from_json(text), text)
    words = text.split()
    if not words:
        raise InputError(f"model_arch: expected layers such as {EXAMPLE}; found nothing")
    runs = [_runs(word, text) for word in words]
    encoders = tuple("".join(letter * count for letter, count in run) for run in runs)
    mirrored = tuple("".join(letter * count for letter, count in reversed(run)) for run in runs)
    return Arch(encoders=encoders[:-1], main=encoders[-1], decoders=mirrored[:-1])


def _runs(word: str, text: str) -> list[tuple[str, int]]:
    """`T1m4` as [("T", 1), ("m", 4)]."""
    found = re.findall(r"([mMtT])(\d+)", word)
    runs = [(letter, int(count)) for letter, count in found]
    if "".join(letter + count for letter, count in found) != word or not 0 < sum(n for _, n in runs) <= 200:
        raise InputError(f"model_arch: expected layers such as {EXAMPLE}; found '{word}' in '{text}'")
    return runs


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"model_arch: expected layers such as {EXAMPLE} or nested lists; found '{text}'") from error


def _nested(tree: Any, text: str) -> Arch:
    match tree:
        case [str(main)]:
            return Arch(encoders=(), main=_letters(main, text), decoders=())
        case [str(encoder), [*_] as inner, str(decoder)]:
            within = _nested(inner, text)
            return Arch(
                encoders=(_letters(encoder, text), *within.encoders),
                main=within.main,
                decoders=(_letters(decoder, text), *within.decoders),
            )
    raise InputError(f'model_arch: expected nested lists such as ["m4", ["T22"], "m4"]; found \'{text}\'')


def _letters(word: str, text: str) -> str:
    return "".join(letter * count for letter, count in _runs(word, text))


def parse_numbers(name: str, text: str) -> list[int]:
    """`256 512` as [256, 512]; `InputError` unless all are whole numbers above 0."""
    try:
        numbers = [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise InputError(f"{name}: expected whole numbers such as '256 512', found '{text}'") from error
    if not numbers or min(numbers) < 1:
        raise InputError(f"{name}: expected whole numbers above 0 such as '256 512', found '{text}'")
    return numbers


def check(config: Mapping[str, Any]) -> tuple[Arch, list[int]]:
    """The architecture and the width of every stage; `InputError` unless a model of this config can be built."""
    arch, widths = parse_arch(config["model_arch"]), parse_numbers("model_dim", config["model_dim"])
    if len(widths) != arch.stages + 1:
        raise InputError(
            f"expected a width for each of the {arch.stages + 1} stages of model_arch '{config['model_arch']}', "
            f"found {len(widths)} in model_dim '{config['model_dim']}'"
        )
    if wrong := [width for width in widths if width % HEAD]:
        raise InputError(f"model_dim: expected multiples of {HEAD}, the width of a head; found {wrong[0]}")
    if any(inner < outer for outer, inner in pairwise(widths)):
        raise InputError(f"model_dim: expected no stage narrower than the one around it, found '{config['model_dim']}'")
    for name in ("d_state", "attention_window", "attention_capacity"):
        if config[name] < 1:
            raise InputError(f"expected {name} of 1 or more, found {config[name]}")
    if config["align"] not in ("none", "utf8"):
        raise InputError(f"expected align of none, utf8; found '{config['align']}'")
    return arch, widths


def mlp_width(width: int) -> int:
    """Hidden width of the SwiGLU: 8/3 of the width, to the nearest multiple of 128."""
    return max(1, round(8 * width / 3 / 128)) * 128


def residual_branches(layers: str) -> int:
    """The number of branches that these layers add to the residual stream."""
    return len(layers) + sum(letter.isupper() for letter in layers)


def state_shapes(config: Mapping[str, Any]) -> StateShapes:
    """The state of one row while bytes are read one by one, in the order of a step's arguments and results.

    `conv` and `ssm` of every Mamba-2 layer, `keys` and `values` of every attention layer as rings, each with the number
    of the layer before it; `count` of the positions that attention has read (chunks, not bytes). All by part:
    `encoder_`, `decoder_`, `main_` for the inner stages. `router` is the router's projection of the last position,
    `started` whether there was one, `average` the smoothed chunk.
    """
    arch, widths = check(config)
    return dict(_stage_shapes(config, arch, widths))


def integer_states(config: Mapping[str, Any]) -> frozenset[str]:
    """The states of `state_shapes` that are int64; the others are float32."""
    return frozenset(name for name in state_shapes(config) if name.endswith(("count", "started")))


def is_ring(state: str) -> bool:
    """Whether a step changes one place of this state only, and does not read it after writing it."""
    return state.endswith(("keys", "values"))


def _stage_shapes(config: Mapping[str, Any], arch: Arch, widths: list[int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = widths[0]
    if not arch.stages:
        yield from _layer_shapes(config, "", arch.main, width, config["attention_capacity"])
        return
    reach = config["attention_window"] + 1
    yield from _layer_shapes(config, "encoder_", arch.encoders[0], width, reach)
    yield "router", (1, width)
    yield "started", (1,)
    for name, shape in _stage_shapes(config, arch.inner, widths[1:]):
        yield f"main_{name}", shape
    yield "average", (1, width)
    yield from _layer_shapes(config, "decoder_", arch.decoders[0], width, reach)


def _layer_shapes(
    config: Mapping[str, Any], prefix: str, layers: str, width: int, ring: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    inner, state = 2 * width, config["d_state"]
    for i, letter in enumerate(layers):
        if letter in "mM":
            yield f"{prefix}{i}_conv", (TAPS - 1, inner + 2 * state)
            yield f"{prefix}{i}_ssm", (state, inner)
        else:
            yield f"{prefix}{i}_keys", (width // HEAD, ring, HEAD)
            yield f"{prefix}{i}_values", (width // HEAD, ring, HEAD)
    if "t" in layers.lower():
        yield f"{prefix}count", (1,)
