"""Attention, MLP and the stack of pre-norm blocks that every stage is made of.

Shapes: B batch, T time, D width, H heads, P width of a head, R places of a ring.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from training.models.hnet.arch import HEAD, ROTARY, mlp_width, residual_branches
from training.models.hnet.mamba2 import Mamba2
from training.models.hnet.precision import RMSNorm

ROTARY_BASE = 10_000.0
State = dict[str, Tensor]


class Attention(nn.Module):
    """Causal attention over the last `reach` positions, heads of 64, of which 32 dimensions are rotated.

    State: rotated keys and values as rings [B, H, R, P]; the place of position t is t mod R.
    Source: Su et al., RoFormer (2021), section 3.2.2; the layout of qkv and of the rotation is flash-attn's.
    """

    frequency: Tensor

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        frequency = ROTARY_BASE ** (-torch.arange(0, ROTARY, 2).float() / ROTARY)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        place_T = torch.arange(x_BTD.shape[1], device=x_BTD.device)
        query, key, value = (self._heads(part) for part in self.Wqkv(x_BTD).chunk(3, -1))
        query, key = self._rotate(query, place_T[:, None]), self._rotate(key, place_T[:, None])
        mixed = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2),
                                               **self._mask(place_T))  # fmt: skip
        y_BTD: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return y_BTD

    def step(
        self, x_B1D: Tensor, keys_BHRP: Tensor, values_BHRP: Tensor, count_B1: Tensor, moved_B: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One position, the `count`-th of its row, and the rings with it; those of rows not `moved` are unchanged.

        Its place in a ring is empty or out of reach, so that a ring may be written in place: the result does not
        depend on whether it is written before or after it is read.
        Not torch's own attention: in an ONNX If, shape inference of onnx 1.23 fails on its exported form.
        """
        query, key, value = (
            self._heads(part).transpose(1, 2) for part in self.Wqkv(x_B1D).chunk(3, -1)
        )  # [B, H, 1, P]
        place_B11, place_R = count_B1[..., None], torch.arange(self.reach, device=x_B1D.device)
        query, key = self._rotate(query, place_B11), self._rotate(key, place_B11)
        hidden_BR = (place_R >= count_B1) | (place_R == count_B1 % self.reach)
        scores_BH1R = query @ keys_BHRP.transpose(2, 3).to(query.dtype)
        scores_BH1R = scores_BH1R.masked_fill(hidden_BR[:, None, None], -torch.inf)
        scores = torch.cat([scores_BH1R, (query * key).sum(-1, keepdim=True)], -1).float() * HEAD**-0.5
        weights_BH1R, weight_BH11 = scores.softmax(-1).to(query.dtype).split([self.reach, 1], -1)
        mixed_BH1P = weights_BH1R @ values_BHRP.to(query.dtype) + weight_BH11 * value
        here = (place_B11[..., None] % self.reach).expand_as(key)
        keys_BHRP, values_BHRP = (
            _written(ring, here, new.float(), moved_B) for ring, new in ((keys_BHRP, key), (values_BHRP, value))
        )
        return self.out_proj(mixed_BH1P.transpose(1, 2).flatten(2)), keys_BHRP, values_BHRP

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, HEAD))

    def _rotate(self, x: Tensor, place: Tensor) -> Tensor:
        """Pairs (i, i + 16) of the first 32 dimensions of `x` [..., heads, 64], turned by place * frequency_i."""
        angle = (place.float() * self.frequency)[..., None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second, rest = x.split([ROTARY // 2, ROTARY // 2, HEAD - ROTARY], -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)

    def _mask(self, place_T: Tensor) -> dict[str, Any]:
        if not torch.compiler.is_exporting() and len(place_T) <= self.reach:
            return {"is_causal": True}
        distance_TT = place_T[:, None] - place_T
        return {"attn_mask": (distance_TT >= 0) & (distance_TT < self.reach)}


class SwiGLU(nn.Module):
    """fc2(y * SiLU(gate)) with y and gate from fc1. Source: Shazeer, GLU Variants (2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * mlp_width(width), bias=False)
        self.fc2 = nn.Linear(mlp_width(width), width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.fc1(x).chunk(2, -1)
        out: Tensor = self.fc2(y * F.silu(gate))
        return out


class Block(nn.Module):
    """The layer of one letter: a norm and a mixer, then for a capital a norm and an MLP."""

    def __init__(self, letter: str, width: int, state_size: int, reach: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.mixer = Mamba2(width, state_size) if letter in "mM" else Attention(width, reach)
        if letter.isupper():
            self.norm2 = RMSNorm(width)
            self.mlp = SwiGLU(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._finish(x_BTD, self.mixer(self.norm1(x_BTD)))

    def step(self, x_B1D: Tensor, *state: Any) -> tuple[Tensor, ...]:
        mixed, *after = self.mixer.step(self.norm1(x_B1D), *state)
        return self._finish(x_B1D, mixed), *after

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + mixed.float()
        return x + self.mlp(self.norm2(x)).float() if hasattr(self, "mlp") else x


class Isotropic(nn.Module):
    """Blocks over one residual stream in float32, and a norm at the end."""

    def __init__(self, letters: str, width: int, state_size: int, reach: int) -> None:
        super().__init__()
        self.letters = letters
        self.layers = nn.ModuleList(Block(letter, width, state_size, reach) for letter in letters)
        self.rmsnorm = RMSNorm(width)
        self.checkpointing = False

    def draw_weights(self, branches: int) -> None:
        """Draw dense weights from N(0, 0.02); at the ends of residual branches over the root of `branches`."""
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                ends = name.endswith(("out_proj", "fc2"))
                nn.init.normal_(layer.weight, std=0.02 / branches**0.5 if ends else 0.02)

    @property
    def branches(self) -> int:
        return residual_branches(self.letters)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD.float()
        for layer in self.layers:
            again = self.checkpointing and self.training
            x_BTD = checkpoint(layer, x_BTD, use_reentrant=False) if again else layer(x_BTD)
        out: Tensor = self.rmsnorm(x_BTD)
        return out

    def step(self, x_B1D: Tensor, state: State, moved_B: Tensor | None = None) -> tuple[Tensor, State]:
        """One position and the state after it; the rings of rows that have not `moved` stay as they are."""
        x_B1D, after = x_B1D.float(), dict(state)
        for i, (letter, layer) in enumerate(zip(self.letters, self.layers, strict=True)):
            names = [f"{i}_{name}" for name in (("conv", "ssm") if letter in "mM" else ("keys", "values"))]
            shared = [] if letter in "mM" else [state["count"], moved_B]
            x_B1D, *new = layer.step(x_B1D, *(state[name] for name in names), *shared)  # type: ignore[operator]
            after.update(zip(names, new, strict=True))
        if "count" in state:
            after["count"] = state["count"] + 1
        return self.rmsnorm(x_B1D), after


def _written(ring_BHRP: Tensor, here: Tensor, new_BH1P: Tensor, moved_B: Tensor | None) -> Tensor:
    """The ring with the new values at the place `here` [B, H, 1, P], for rows that have moved."""
    if moved_B is not None:
        new_BH1P = torch.where(moved_B[:, None, None, None], new_BH1P, ring_BHRP.gather(2, here))
    return ring_BHRP.scatter(2, here, new_BH1P)
