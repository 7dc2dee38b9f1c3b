"""The ratio loss, which controls compression, and the learning rates of the stages.

Source: Hwang, Wang and Gu (2025), sections 2.3 (ratio loss) and 2.3.3 (learning rates by stage).
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

LAMBDA_SCALE = 4.6  # bytes a token of a subword model has on average


def ratio_loss(chosen: Tensor | float, likely: Tensor | float, ratio: float) -> Tensor | float:
    """N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)): 1 where `chosen` F and `likely` G are both 1 / N.

    F is the share of positions that begin a chunk, G their mean probability, N the target positions a chunk.
    """
    return ratio / (ratio - 1) * ((ratio - 1) * chosen * likely + (1 - chosen) * (1 - likely))


def alpha_at(epoch: int, alpha: float, warmup_epochs: int) -> float:
    """The weight of the ratio loss in an epoch, counted from 0; full after `warmup_epochs`."""
    return alpha * min(1.0, (epoch + 1) / (warmup_epochs + 1))


def stage_ratios(n_compress: Sequence[int]) -> list[float]:
    """Positions a chunk at every stage, from bytes a position: [1, 3, 9] gives [3, 3]."""
    return [inner / outer for outer, inner in pairwise(n_compress)]


def learning_rate_multipliers(n_compress: Sequence[int], widths: Sequence[int]) -> list[float]:
    """lambda_s of every stage: an outer stage has more positions and less width, and so a larger rate."""
    return [
        (LAMBDA_SCALE / bytes_a_position * widths[-1] / width) ** 0.5
        for bytes_a_position, width in zip(n_compress, widths, strict=True)
    ]


def stage_of(parameter: str, stages: int) -> int:
    """The stage a parameter of this name belongs to; the innermost layers are in two nested `main_network`s."""
    return min(parameter.split(".").count("main_network"), stages)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: not norms, biases, A_log, dt_bias, D and pad_dimension, all of one dimension."""
    return parameter.ndim > 1
