"""Symmetric InfoNCE over large batches in little memory: gradients in closed form, recomputed activations.

Scores S_ij = x_i . y_j / temperature; with P the softmax of its rows and Q that of its columns,
dL/dx = ((P + Q) y - 2 y) / (2 N temperature), and the same for y with S transposed. Statements of the same paper are no
negatives of each other: their scores are masked, except those of the pairs.

Shapes: N pairs of the batch on all devices, n on this one, C of a chunk, D width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 256  # rows of scores that are in memory at once

Embed = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """The n rows of scores that begin at row `first`, from their own vectors and those of the other side."""

    own_nD: Tensor
    others_ND: Tensor
    papers_N: Tensor
    first: int
    temperature: float

    def normalisers(self) -> Tensor:
        """The logarithm of each row's sum of exponentials [n]."""
        return torch.cat([scores_CN.logsumexp(1) for _, scores_CN in self._chunks()])

    def paired(self) -> Tensor:
        """The score of each row with its own partner [n]."""
        return (self.own_nD * self._partners()).sum(1) / self.temperature

    def gradient(self, own_n: Tensor, others_N: Tensor) -> Tensor:
        """The gradient of the loss for the own vectors [n, D], from the normalisers of both sides."""
        pulls = []
        for rows, scores_CN in self._chunks():
            weights_CN = (scores_CN - own_n[rows, None]).exp() + (scores_CN - others_N).exp()
            pulls.append(weights_CN @ self.others_ND)
        return (torch.cat(pulls) - 2 * self._partners()) / (2 * len(self.others_ND) * self.temperature)

    def _partners(self) -> Tensor:
        return self.others_ND[self.first : self.first + len(self.own_nD)]

    def _chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Scores [C, N] of a chunk of rows, -inf where two statements are of one paper and no pair."""
        places_N = torch.arange(len(self.papers_N), device=self.papers_N.device)
        for start in range(0, len(self.own_nD), CHUNK):
            rows = slice(start, min(start + CHUNK, len(self.own_nD)))
            mine_C = places_N[self.first + rows.start : self.first + rows.stop]
            same_CN = (self.papers_N[mine_C, None] == self.papers_N) & (mine_C[:, None] != places_N)
            scores_CN = self.own_nD[rows] @ self.others_ND.T / self.temperature
            yield rows, scores_CN.masked_fill(same_CN, -torch.inf)


@torch.no_grad()
def info_nce(x_nD: Tensor, y_nD: Tensor, papers_n: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss over the batch of all devices, and its gradients for the own x and y."""
    x_ND, y_ND, papers_N = gather(x_nD), gather(y_nD), gather(papers_n)
    first = rank() * len(x_nD)
    common: dict[str, Any] = {"papers_N": papers_N, "first": first, "temperature": temperature}
    rows = Side(own_nD=x_nD, others_ND=y_ND, **common)
    columns = Side(own_nD=y_nD, others_ND=x_ND, **common)
    of_rows, of_columns = rows.normalisers(), columns.normalisers()
    losses_N = gather(of_rows + of_columns - 2 * rows.paired()) / 2
    x_gradient, y_gradient = rows.gradient(of_rows, gather(of_columns)), columns.gradient(of_columns, gather(of_rows))
    return losses_N.mean(), x_gradient, y_gradient


def gather(tensor: Tensor) -> Tensor:
    """The rows of all devices in the order of their ranks; every device must give equally many."""
    if world() == 1:
        return tensor
    pieces = [torch.empty_like(tensor) for _ in range(world())]
    torch.distributed.all_gather(pieces, tensor.contiguous())
    return torch.cat(pieces)


def world() -> int:
    """How many processes train together."""
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def rank() -> int:
    """The number of this process among them."""
    return torch.distributed.get_rank() if world() > 1 else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A micro-batch: rows of the batch, their tokens, and the seed of their dropout in every pass."""

    rows: Tensor
    ids: Tensor
    mask: Tensor
    seed: int


def cut(ids_BT: Tensor, mask_BT: Tensor, size: int) -> list[Piece]:
    """The batch in pieces of `size` rows of like length, without the padding that is longer than a piece."""
    lengths_B = mask_BT.sum(1)
    pieces = []
    for rows in lengths_B.argsort(descending=True).split(size):
        longest = int(lengths_B[rows[0]])
        seed = int(torch.randint(2**31, ()))
        pieces.append(Piece(rows=rows, ids=ids_BT[rows, :longest], mask=mask_BT[rows, :longest], seed=seed))
    return pieces


class CachedContrast(torch.autograd.Function):
    """The loss of a batch of pairs whose activations are never in memory for more than one piece of it.

    Forward embeds without gradients and computes the gradients of the vectors; backward embeds each piece again with
    the same dropout and returns the gradients of the parameters (GradCache: Gao et al., 2021). Only the longest
    piece, the first, is embedded once, last and with gradients: a batch of a single piece costs nothing more. The
    gradients of all pieces are returned by one function once, as DDP requires.
    """

    @staticmethod
    def forward(
        ctx: Any, embed: Embed, pieces: Sequence[Piece], papers_n: Tensor, temperature: float, *parameters: nn.Parameter
    ) -> Tensor:
        later = [_embed(embed, piece) for piece in pieces[1:]]
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):
            first_BD = _embed(embed, pieces[0])
        vectors_BD = torch.empty(2 * len(papers_n), first_BD.shape[1], device=papers_n.device)
        for piece, piece_BD in zip(pieces, [first_BD.detach(), *later], strict=True):
            vectors_BD[piece.rows] = piece_BD
        x_nD, y_nD = vectors_BD.chunk(2)
        loss, *gradients = info_nce(x_nD, y_nD, papers_n, temperature)
        ctx.embed, ctx.pieces, ctx.parameters, ctx.first_BD = embed, pieces, parameters, first_BD
        ctx.gradient_BD = torch.cat(gradients)
        kind = papers_n.device.type
        ctx.cast = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        ctx.cast["dtype"] = torch.get_autocast_dtype(kind)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient_BD = ctx.gradient_BD * upstream * world()  # DDP takes the mean over devices; the loss is already one
        totals = list(torch.autograd.grad(ctx.first_BD, ctx.parameters, gradient_BD[ctx.pieces[0].rows]))
        for piece in ctx.pieces[1:]:
            with torch.enable_grad(), torch.autocast(**ctx.cast):
                vectors_BD = _embed(ctx.embed, piece)
            found = torch.autograd.grad(vectors_BD, ctx.parameters, gradient_BD[piece.rows])
            totals = [total + one for total, one in zip(totals, found, strict=True)]
        return None, None, None, None, *totals


def _embed(embed: Embed, piece: Piece) -> Tensor:
    with _seeded(piece.seed, piece.ids.device):
        return embed(piece.ids, piece.mask)


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """In this context random numbers are those of `seed`; the generator's state is restored afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
