"""The exported modules of an H-Net: whole texts with the cost of their bytes, and one byte with its state as tensors.

Shapes: B batch, T bytes, S stages, V vocabulary (256).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.models.hnet.module import HNetForCausalLM

NOTHING = -1  # the byte of padding


class HNetScorer(nn.Module):
    """Whole texts: the outputs of `hnet`, and the cost of every byte."""

    def __init__(self, hnet: HNetForCausalLM) -> None:
        super().__init__()
        self.hnet = hnet

    def forward(self, byte_ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, ...]:
        """Logits, p, b, the nats of each byte after the first [B, T], and the bytes [B, T], -1 for padding."""
        logits_BTV, p_BTS, b_BTS = self.hnet(byte_ids_BT, lengths_B)
        time = byte_ids_BT.shape[1]
        place_T = torch.arange(time, device=byte_ids_BT.device)
        real_BT = place_T < lengths_B[:, None]
        following_BT1 = F.pad(byte_ids_BT, (0, 1))[:, 1:, None]
        nats_BT = -torch.log_softmax(logits_BTV, -1).gather(-1, following_BT1)[..., 0]
        # Cut after padding: cut before it, torch.export 2.13 requires a time other than 2.
        nats_BT = torch.where(real_BT & (place_T > 0), F.pad(nats_BT, (1, 0))[:, :time], 0.0)
        return logits_BTV, p_BTS, b_BTS, nats_BT, torch.where(real_BT, byte_ids_BT, NOTHING)


class HNetStep(nn.Module):
    """One byte of every row, with the state as tensors in the order of `state_shapes`."""

    def __init__(self, hnet: HNetForCausalLM) -> None:
        super().__init__()
        self.hnet = hnet

    def forward(self, byte_ids_B1: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Logits [B, 1, V], p and b [B, 1, S], and the state after this byte."""
        now = dict(zip(self.hnet.shapes, state, strict=True))
        *printed, after = self.hnet.read(byte_ids_B1, now)
        return *printed, *(after[name] for name in self.hnet.shapes)

    def whole(self, byte_ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, p and b of whole texts, by the forward pass over a whole text."""
        printed: tuple[Tensor, Tensor, Tensor] = self.hnet(
            byte_ids_BT, torch.full((len(byte_ids_BT),), byte_ids_BT.shape[1])
        )
        return printed
