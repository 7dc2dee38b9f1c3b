"""The layers of the policies. Each maps a state to the next: one function for windows and for steps.

Shapes: B batch, T time, H hidden, D inner channels, N state size, K convolution taps, W attention window.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.scan import selective_scan

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4


class Mamba(nn.Module):
    """A Mamba-1 mixer with the parameter names and shapes of `mamba_ssm.Mamba`, so that its weights load.

    State: the last K - 1 inputs of the convolution [B, D, K-1] and the recurrent state [B, D, N], in float32.
    Source: Gu and Dao, Mamba (2023), section 3.4 and appendix.
    """

    def __init__(self, hidden: int, *, expand: int = 2, state_size: int = 16, taps: int = 4) -> None:
        super().__init__()
        inner, self.rank, self.state_size, self.taps = expand * hidden, math.ceil(hidden / 16), state_size, taps
        self.in_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1, state_size + 1).float().log().expand(inner, -1).clone())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, hidden, bias=False)
        self._reset_step()

    def _reset_step(self) -> None:
        """Draw softplus(dt_proj.bias) log-uniformly from [STEP_MIN, STEP_MAX]."""
        bound = self.rank**-0.5
        step = torch.exp(torch.empty_like(self.dt_proj.bias).uniform_(math.log(STEP_MIN), math.log(STEP_MAX)))
        step = step.clamp_min(STEP_FLOOR)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-bound, bound)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(self, x_BTH: Tensor, conv_BDK: Tensor, ssm_BDN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BTD, gate_BTD = self.in_proj(x_BTH).chunk(2, -1)
        seen = torch.cat([conv_BDK.to(x_BTD.dtype), x_BTD.mT], -1)
        conv_BDK = seen[..., seen.shape[-1] - (self.taps - 1) :]
        x_BTD = F.silu(self._convolve(seen, x_BTD.shape[1])).mT
        step_BTR, in_BTN, out_BTN = self.x_proj(x_BTD).split([self.rank, self.state_size, self.state_size], -1)
        # The recurrence is kept in float32: its rounding errors would add up over a stream.
        step_BTD = F.softplus(self.dt_proj(step_BTR).float())
        A_DN = -torch.exp(self.A_log.float())
        y_BTD, ssm_BDN = selective_scan(x_BTD.float(), step_BTD, A_DN, in_BTN.float(), out_BTN.float(), ssm_BDN)
        y_BTD = (y_BTD + x_BTD.float() * self.D.float()).to(gate_BTD.dtype)
        return self.out_proj(y_BTD * F.silu(gate_BTD)), conv_BDK.float(), ssm_BDN

    def _convolve(self, seen_BDS: Tensor, time: int) -> Tensor:
        """conv1d as a sum of shifted products: for four taps faster in ONNX Runtime than its depthwise Conv."""
        assert self.conv1d.bias is not None
        x_BDT = self.conv1d.bias[:, None]
        for k in range(self.taps):
            x_BDT = x_BDT + self.conv1d.weight[:, 0, k, None] * seen_BDS[..., k : k + time]
        return x_BDT


class WindowAttention(nn.Module):
    """Causal attention over the last W positions, with a cache of the W - 1 before this piece.

    State: unrotated keys and values [B, W-1, H], the newest last, and how many of them are real, int64 [B, 1].
    Rotary angles count from the cache's first place; they depend on differences only, so that a stream of any
    length stays within the distances of the training. Source: Su et al., RoFormer (2021), section 3.2.2.
    """

    frequency: Tensor

    def __init__(self, hidden: int, *, heads: int, window: int, normalise: bool = False) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)
        width = hidden // heads
        self.query_norm = nn.LayerNorm(width) if normalise else nn.Identity()
        self.key_norm = nn.LayerNorm(width) if normalise else nn.Identity()
        frequency = 10_000.0 ** (-torch.arange(0, width, 2).float() / width)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, x_BTH: Tensor, keys_BWH: Tensor, values_BWH: Tensor, seen_B1: Tensor) -> tuple[Tensor, ...]:
        query_BTH, key_BTH, value_BTH = self.qkv(x_BTH).chunk(3, -1)
        keys_BSH = torch.cat([keys_BWH.to(key_BTH.dtype), key_BTH], 1)
        values_BSH = torch.cat([values_BWH.to(value_BTH.dtype), value_BTH], 1)
        past, length = self.window - 1, keys_BSH.shape[1]
        place_S = torch.arange(length, device=x_BTH.device)
        query = self._rotate(self.query_norm(self._split(query_BTH)), place_S[past:])
        key = self._rotate(self.key_norm(self._split(keys_BSH)), place_S)
        scores = query @ key.mT / math.sqrt(query.shape[-1])
        distance_TS = place_S[past:, None] - place_S
        allowed_TS = (distance_TS >= 0) & (distance_TS < self.window)
        real_BS = place_S >= past - seen_B1
        scores = scores.masked_fill(~(allowed_TS & real_BS[:, None, None, :]), -1e4)  # fits in float16
        mixed = (torch.softmax(scores, -1) @ self._split(values_BSH)).transpose(1, 2).flatten(2)
        tail = slice(length - past, None)
        return self.out(mixed), keys_BSH[:, tail].float(), values_BSH[:, tail].float()

    def _split(self, x_BTH: Tensor) -> Tensor:
        return x_BTH.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _rotate(self, x: Tensor, place: Tensor) -> Tensor:
        """Rotate pairs (i, i + width/2) of `x` [B, heads, places, width] by place * frequency_i."""
        angle = place[:, None].float() * self.frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)


class FeedForward(nn.Sequential):
    """Two dense layers with a GELU between, four times as wide."""

    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__(nn.Linear(hidden, 4 * hidden), nn.GELU(), nn.Linear(4 * hidden, hidden), nn.Dropout(dropout))
