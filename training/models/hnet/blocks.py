"""Attention, MLP and the stack of pre-norm blocks that every stage is made of.

Shapes: B batch, T time, D width, H heads, P width of a head, R places of a ring, L layers.
"""

from itertools import count
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

    State: rotated keys and values as rings [B, R, D]; the place of position t is t mod R.
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

    def step(self, x_BD: Tensor, keys_BRD: Tensor, values_BRD: Tensor, count_B1: Tensor) -> tuple[Tensor, ...]:
        """One position, the `count`-th of its row: (output, its key, its value); who called writes them into the ring.

        Written out: in an ONNX If, shape inference of onnx 1.23 fails on what the exporter makes of torch's own.
        """
        query, key, value = self.Wqkv(x_BD).chunk(3, -1)
        query, key = self._rotate(self._heads(query), count_B1), self._rotate(self._heads(key), count_B1)
        key_BD, value_BD = key.flatten(1).float(), value.float()
        keys_BHRP = self._heads(torch.cat([keys_BRD, key_BD[:, None]], 1)).transpose(1, 2).to(query.dtype)
        values_BHRP = self._heads(torch.cat([values_BRD, value_BD[:, None]], 1)).transpose(1, 2).to(query.dtype)
        scores_BH1R = (query[:, :, None] @ keys_BHRP.mT).float() * HEAD**-0.5
        place_R = torch.arange(self.reach + 1, device=x_BD.device)
        # The last is its own; the place it will take holds nothing yet, or what is out of reach now.
        seen_BR = ((place_R < count_B1) & (place_R != count_B1 % self.reach)) | (place_R == self.reach)
        weights_BH1R = scores_BH1R.masked_fill(~seen_BR[:, None, None], -torch.inf).softmax(-1).to(query.dtype)
        return self.out_proj((weights_BH1R @ values_BHRP).flatten(1)), key_BD, value_BD

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
    """What one letter stands for: a mixer behind a norm, and behind another an MLP if the letter is a capital."""

    def __init__(self, letter: str, width: int, state_size: int, reach: int) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.mixer = Mamba2(width, state_size) if letter in "mM" else Attention(width, reach)
        if letter.isupper():
            self.norm2 = RMSNorm(width)
            self.mlp = SwiGLU(width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self._finish(x_BTD, self.mixer(self.norm1(x_BTD)))

    def step(self, x_BD: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        mixed, *after = self.mixer.step(self.norm1(x_BD), *state)
        return self._finish(x_BD, mixed), *after

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

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """One position; `state` holds `conv`, `ssm`, `keys`, `values` and `count`, as far as there are such layers."""
        x_BD = x_BD.float()
        after: dict[str, list[Tensor]] = {name: [] for name in state if name != "count"}
        number = {"m": count(), "t": count()}
        for letter, layer in zip(self.letters, self.layers, strict=True):
            own = ("conv", "ssm") if letter in "mM" else ("keys", "values")
            i = next(number[letter.lower()])
            shared = [state["count"]] if letter in "tT" else []
            x_BD, *new = layer.step(x_BD, *(state[name][:, i] for name in own), *shared)  # type: ignore[operator]
            for name, tensor in zip(own, new, strict=True):
                after[name].append(tensor)
        result = {name: torch.stack(tensors, 1) for name, tensors in after.items()}
        if "count" in state:
            for name in ("keys", "values"):
                result[name] = _in_ring(state[name], result[name], state["count"])
            result["count"] = state["count"] + 1
        return self.rmsnorm(x_BD), result


def _in_ring(ring_BLRD: Tensor, new_BLD: Tensor, count_B1: Tensor) -> Tensor:
    """The rings of all layers with what is new at the place of the `count`-th position."""
    reach = ring_BLRD.shape[2]
    here_BR = torch.arange(reach, device=ring_BLRD.device) == count_B1 % reach
    return torch.where(here_BR[:, None, :, None], new_BLD[:, :, None], ring_BLRD)
