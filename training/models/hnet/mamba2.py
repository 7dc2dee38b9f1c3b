"""A Mamba-2 mixer with the parameter names and shapes of `mamba_ssm.Mamba2`, so that its weights load.

Shapes: B batch, T time, D width, I inner width (2 D), H heads, P channels of a head, N state size, K taps,
C channels of the convolution (I + 2 N).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.layers.scan import current_form, decayed_sums
from training.models.hnet.arch import HEAD, TAPS
from training.models.hnet.precision import RMSNorm, in_float32

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4
A_MIN, A_MAX = 1.0, 16.0


class Mamba2(nn.Module):
    """Expand by 2, convolve over 4 taps, one decay a head, one group; normed after the gate.

    State: the last K - 1 inputs of the convolution [B, K-1, C] and the recurrence [B, N, I], in float32.
    Source: Dao and Gu, Transformers are SSMs (2024), section 7.
    """

    head_of_I: Tensor

    def __init__(self, width: int, state_size: int) -> None:
        super().__init__()
        self.inner, self.heads, self.state_size = 2 * width, 2 * width // HEAD, state_size
        mixed = self.inner + 2 * state_size
        self.in_proj = nn.Linear(width, self.inner + mixed + self.heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, TAPS, groups=mixed, padding=TAPS - 1)
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(A_MIN, A_MAX).log())
        self.dt_bias = nn.Parameter(_inverse_softplus(_log_uniform(self.heads).clamp_min(STEP_FLOOR)))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.norm = RMSNorm(self.inner)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.register_buffer("head_of_I", torch.arange(self.heads).repeat_interleave(HEAD), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The whole sequence, from a state of zeros."""
        gate_BTI, mixed_BTC, step_BTH = self._project(x_BTD)
        seen_BSC = F.pad(mixed_BTC, (0, 0, TAPS - 1, 0))
        x_BTHP, in_BTN, out_BTN = self._split(self._convolve(seen_BSC, x_BTD.shape[1]))
        with in_float32(x_BTD):
            step_BTH = F.softplus(step_BTH.float() + self.dt_bias.float())
            x_BTHP = x_BTHP.float()
            zero_BHPN = x_BTHP.new_zeros(x_BTHP.shape[0], self.heads, HEAD, self.state_size)
            y_BTHP, _ = decayed_sums(
                x_BTHP * step_BTH[..., None], step_BTH * self._rate(), in_BTN.float(), out_BTN.float(), zero_BHPN
            )
            y_BTHP = y_BTHP + x_BTHP * self.D.float()[:, None]
            y_BTI = self.norm(y_BTHP.flatten(-2) * F.silu(gate_BTI.float()))
        y_BTD: Tensor = self.out_proj(y_BTI)
        return y_BTD

    def step(self, x_B1D: Tensor, conv_BKC: Tensor, ssm_BNI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One position, from the state given to the next.

        All channels are in the last axis, also in the state, so that nothing is transposed and heads are not split.
        """
        gate_B1I, mixed_B1C, step_B1H = self._project(x_B1D)
        seen_BSC = torch.cat([conv_BKC.to(mixed_B1C.dtype), mixed_B1C], 1)
        assert self.conv1d.bias is not None
        convolved_B1C = (seen_BSC * self.conv1d.weight[:, 0].mT).sum(1, keepdim=True) + self.conv1d.bias
        x_B1I, in_B1N, out_B1N = F.silu(convolved_B1C).float().split(self._sizes, -1)
        step_B1I = self._by_channel(F.softplus(step_B1H.float() + self.dt_bias.float()))
        kept_B1I = torch.exp(step_B1I * self._by_channel(self._rate()))
        ssm_BNI = kept_B1I * ssm_BNI + in_B1N.mT @ (step_B1I * x_B1I)
        y_B1I = out_B1N @ ssm_BNI + x_B1I * self._by_channel(self.D.float())
        y_B1I = self.norm(y_B1I * F.silu(gate_B1I.float()))
        return self.out_proj(y_B1I), seen_BSC[:, 1:].float(), ssm_BNI

    @property
    def _sizes(self) -> list[int]:
        return [self.inner, self.state_size, self.state_size]

    def _by_channel(self, by_head: Tensor) -> Tensor:
        """[..., H] as [..., I]: every channel has the value of its head."""
        # TensorRT-RTX 1.7 fails on a product with ones and zeros in its place.
        return by_head.index_select(-1, self.head_of_I)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, mixed, step = self.in_proj(x).split([self.inner, self.conv1d.out_channels, self.heads], -1)
        return gate, mixed, step

    def _convolve(self, seen_BSC: Tensor, time: int) -> Tensor:
        """conv1d and SiLU; in torch as a sum of shifted products, so that nothing is transposed."""
        assert self.conv1d.bias is not None
        if (form := current_form()) and form.kind == "operator":  # ONNX Runtime is faster with the convolution
            x_BCT = F.conv1d(seen_BSC.mT, self.conv1d.weight, self.conv1d.bias, groups=self.conv1d.groups)
            return F.silu(x_BCT.mT.contiguous())
        x_BTC = self.conv1d.bias
        for k in range(TAPS):
            x_BTC = x_BTC + self.conv1d.weight[:, 0, k] * seen_BSC[:, k : k + time]
        return F.silu(x_BTC)

    def _split(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, into, out = mixed.split(self._sizes, -1)
        return x.unflatten(-1, (self.heads, HEAD)), into, out

    def _rate(self) -> Tensor:
        """A, one negative number a head; times the step it is the logarithm of the decay."""
        return -torch.exp(self.A_log.float())


def _log_uniform(size: int) -> Tensor:
    return torch.exp(torch.empty(size).uniform_(math.log(STEP_MIN), math.log(STEP_MAX)))


def _inverse_softplus(value: Tensor) -> Tensor:
    return value + torch.log(-torch.expm1(-value))
