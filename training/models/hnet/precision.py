"""The parts that stay in float32 in every precision: norms, recurrences, the residual stream."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

EPSILON = 1e-5


class RMSNorm(nn.Module):
    """x over its root mean square, times a weight; computed in float32, returned in the weight's precision."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        # Divided by a root, not times its reciprocal: so ONNX Runtime finds one operator in it.
        x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + EPSILON)
        return (x * self.weight.float()).to(self.weight.dtype)


def in_float32(tensor: Tensor) -> AbstractContextManager[object]:
    """Inside, autocast is off. Nothing is entered where it is off already: a traced graph could not hold it."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
