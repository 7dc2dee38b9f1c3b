"""Dynamic chunking: boundaries of segments, the vectors of segments, and their way back to the bytes.

Shapes: B batch, T positions, K chunks (the most of any row), D width.
Source: Hwang, Wang and Gu, Dynamic Chunking for End-to-End Hierarchical Sequence Modeling (2025), section 2.2.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.scan import current_form, decayed_sums
from training.models.hnet.precision import in_float32

P_MIN = 1e-4  # of a boundary, where it smooths
LENGTH_MIN = 1e-12  # of a vector, where it is divided by its length


class Router(nn.Module):
    """The probability that a segment begins at a position: half of one minus the cosine of it and the position before.

    As in the public weights, `q_proj_layer` takes the earlier position and `k_proj_layer` the later; the paper swaps
    them. Both are initialized as the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj_layer = nn.Linear(width, width, bias=False)
        self.k_proj_layer = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.q_proj_layer.weight)
        nn.init.eye_(self.k_proj_layer.weight)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """p [B, T] in float32; 1 at the first position."""
        time = x_BTD.shape[1]
        # Cut after padding: cut before it, torch.export 2.13 requires a time other than 2.
        earlier_BTD = F.pad(self.earlier(x_BTD), (0, 0, 1, 0))[:, :time]
        first_T = torch.arange(time, device=x_BTD.device) == 0
        return torch.where(first_T, 1.0, self._unlikeness(earlier_BTD, x_BTD))

    def step(self, x_B1D: Tensor, earlier_B1D: Tensor, started_B1: Tensor) -> Tensor:
        """p [B, 1] of a position, from the projection `earlier` of the one before; 1 for a row not `started`."""
        return torch.where(started_B1 > 0, self._unlikeness(earlier_B1D, x_B1D), 1.0)

    def earlier(self, x: Tensor) -> Tensor:
        """The projection of `x` for the comparison with the next position: a direction in float32."""
        return _direction(self.q_proj_layer(x))

    def _unlikeness(self, earlier: Tensor, x: Tensor) -> Tensor:
        with in_float32(x):
            cosine = (earlier * _direction(self.k_proj_layer(x))).sum(-1)
            return ((1 - cosine) / 2).clamp(0, 1)


def _direction(x: Tensor) -> Tensor:
    """x over its length, in float32; zero stays zero."""
    x = x.float()
    # As torch's normalize, which an exporter writes with the shape of x in it.
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(LENGTH_MIN)


def begins(p: Tensor) -> Tensor:
    """Where a segment begins. A tie begins one, as in the paper; goombalab's argmax does not."""
    return p >= 0.5


def confidence_gate(p: Tensor, boundary: Tensor) -> Tensor:
    """1, with the gradient of the probability of the decision (the straight-through estimator)."""
    chosen = torch.where(boundary, p, 1 - p)
    return 1 + (chosen - chosen.detach())


class Chunks(NamedTuple):
    """Where the chunks of every row start, the chunk of every position, and which chunks are real.

    starts [B, K] and places [B, T] are int64, real is bool [B, K].
    """

    starts: Tensor
    places: Tensor
    real: Tensor


class ChunkMatrices(NamedTuple):
    """Chunks in tensors of fixed size T, with matrices of zeros and ones in place of data-dependent sizes.

    starts [B, K, T] is one where a chunk starts, places [B, T, K] where a position belongs; real is bool [B, K].
    """

    starts: Tensor
    places: Tensor
    real: Tensor


def divide(boundary_BT: Tensor) -> Chunks | ChunkMatrices:
    """The chunks that begin where `boundary` is true; every row has one at its first position.

    In the form without loops, for TensorRT, their number does not depend on the data.
    """
    form = current_form()
    return _matrices(boundary_BT) if form and form.kind == "doubling" else _chunks(boundary_BT)


def _chunks(boundary_BT: Tensor) -> Chunks:
    time = boundary_BT.shape[1]
    number_BT = boundary_BT.long().cumsum(1)
    chunks = _most(number_BT[:, -1], time)
    position_BT = torch.arange(time, device=boundary_BT.device).expand_as(number_BT)
    nowhere = torch.full_like(number_BT, time)  # a column for positions that begin no chunk, cut off below
    starts_BS = number_BT.new_zeros(number_BT.shape[0], time + 1)
    starts_BS = starts_BS.scatter(1, torch.where(boundary_BT, number_BT - 1, nowhere), position_BT)
    chunk_K = torch.arange(chunks, device=boundary_BT.device)
    # Gathered and not sliced: for the tracer the size of a slice is a minimum of two others.
    starts_BK = starts_BS.gather(1, chunk_K.expand(number_BT.shape[0], -1))
    return Chunks(starts_BK, number_BT - 1, chunk_K < number_BT[:, -1:])


def _matrices(boundary_BT: Tensor) -> ChunkMatrices:
    number_BT = boundary_BT.float().cumsum(1)  # TensorRT sums no integers
    chunk_T = torch.arange(1, boundary_BT.shape[1] + 1, device=boundary_BT.device).float()
    places_BTK = number_BT[..., None] == chunk_T
    starts_BKT = (places_BTK & boundary_BT[..., None]).mT
    return ChunkMatrices(starts_BKT.float(), places_BTK.float(), chunk_T <= number_BT[:, -1:])


def _most(count_B: Tensor, time: int) -> int:
    """The largest number of chunks of a row, at least 2: torch.export 2.13 guards on whether an unknown size is 1."""
    most = count_B.max().clamp_min(2).item()
    torch._check(most >= 2)
    torch._check(most <= time + 1)
    return most  # type: ignore[return-value]


def downsample(x_BTD: Tensor, chunks: Chunks | ChunkMatrices) -> Tensor:
    """The vector of each chunk [B, K, D]: that of the position that begins it."""
    return _taken(x_BTD, chunks.starts)


def upsample(z_BKD: Tensor, chunks: Chunks | ChunkMatrices) -> Tensor:
    """For each position the vector of its chunk [B, T, D]."""
    return _taken(z_BKD, chunks.places)


def _taken(rows_BND: Tensor, which: Tensor) -> Tensor:
    """Rows by number [B, M], or by a matrix [B, M, N] with at most one 1 in each of its rows."""
    if which.dim() == 3:
        return (which.to(rows_BND.dtype) @ rows_BND) if rows_BND.is_floating_point() else (which @ rows_BND.float()) > 0
    return rows_BND.gather(1, which[..., None].expand(-1, -1, rows_BND.shape[-1]))


def smooth(z_BKD: Tensor, p_BK: Tensor) -> Tensor:
    """Over the chunks of a row, average_k = p_k z_k + (1 - p_k) average_(k-1), from zero; p kept off 0 and 1."""
    with in_float32(z_BKD):
        p_BK = p_BK.float().clamp(P_MIN, 1 - P_MIN)
        one_BK1 = torch.ones_like(p_BK)[..., None]
        x_BK1D = (p_BK[..., None] * z_BKD.float())[:, :, None]
        zero_B1D1 = x_BK1D.new_zeros(z_BKD.shape[0], 1, z_BKD.shape[-1], 1)
        return decayed_sums(x_BK1D, torch.log(1 - p_BK)[..., None], one_BK1, one_BK1, zero_B1D1)[0][:, :, 0]


def smooth_step(z: Tensor, p: Tensor, average: Tensor) -> Tensor:
    """One chunk of `smooth`: z and average [..., D], p [...]."""
    p = p.clamp(P_MIN, 1 - P_MIN)[..., None]
    return p * z.float() + (1 - p) * average
