"""The first experiments of the tuning guide for Telugu, the paper's setting, and a model without segments."""

from collections.abc import Mapping

from training.config import Config
from training.models.hnet.arch import check, mlp_width, residual_branches
from training.recipe import Sweep

Changes = Mapping[str, Mapping[str, str]]


def guide(config: Config, training: Config) -> Changes:
    """Each changes one thing of the guide's start: patience 2, alpha 1, and batch and widths as they are set."""
    _, widths = check(config)
    start, twice = {"patience": "2", "alpha": "1.0"}, 2 * training["batch"]
    wider = " ".join(map(str, [*widths[:-1], 2 * widths[-1]]))
    layers = same_size_layers(config)
    return {
        "start of the guide": start,
        f"patience 10, batch {twice}": {**start, "patience": "10", "batch": str(twice)},
        f"widths {wider}": {**start, "model_dim": wider},
        "alpha 2": {**start, "alpha": "2.0"},
        "alpha 5": {**start, "alpha": "5.0"},
        "alpha 0.03 (paper)": {**start, "alpha": "0.03"},
        f"transformer T{layers} {widths[-1]}": {
            **start,
            "model_arch": f"T{layers}",
            "model_dim": str(widths[-1]),
            "n_compress": "1",
        },
    }


def same_size_layers(config: Config) -> int:
    """How many Transformer layers of the innermost width have about as many parameters as this model."""
    _, widths = check(config)
    width = widths[-1]
    layer = 4 * width**2 + 3 * width * mlp_width(width) + 2 * width
    return max(1, round((parameters(config) - 2 * 256 * width) / layer))


def parameters(config: Config) -> int:
    """How many parameters a model of this config has."""
    arch, widths = check(config)
    count = 2 * 256 * widths[0]
    for encoder, decoder, width in zip(arch.encoders, arch.decoders, widths, strict=False):
        count += _stack(encoder, width, config["d_state"]) + _stack(decoder, width, config["d_state"])
        count += 2 * width**2 + width**2 + width  # the router's two projections, the residual's one
    count += _stack(arch.main, widths[-1], config["d_state"])
    return count + widths[-1] - widths[0]


def _stack(letters: str, width: int, state: int) -> int:
    mamba = width * (6 * width + 2 * state + width // 32) + 5 * (2 * width + 2 * state) + 3 * width // 32 + 3 * width
    attention, mlp = 4 * width**2 + width, 3 * width * mlp_width(width) + width
    mixers = sum(mamba if letter in "mM" else attention for letter in letters)
    return mixers + mlp * (residual_branches(letters) - len(letters)) + width


SWEEP = Sweep(
    runs=guide,
    columns=(
        "bits_per_byte", "code_points_per_chunk", "bytes_per_chunk", "F", "G", "inside_code_point", "criterion",
    ),
    plotted=("code_points_per_chunk", "bits_per_byte"),
)  # fmt: skip
