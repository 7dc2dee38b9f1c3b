"""H-Net: bytes in, predictions of the next byte and boundaries of segments out; for whole texts and single bytes.

Module names are those of the public checkpoints (goombalab/hnet), so that their weights load.
Shapes: B batch, T bytes, K chunks, D width, S stages, V vocabulary (256).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from training.layers.scan import current_form
from training.models.hnet.arch import VOCABULARY, Arch, check, integer_states, is_ring, state_shapes
from training.models.hnet.blocks import Isotropic, State
from training.models.hnet.precision import in_float32
from training.models.hnet.routing import (
    Router,
    begins,
    confidence_gate,
    divide,
    downsample,
    smooth,
    smooth_step,
    upsample,
)

INNER = "main_"  # prefix of the states of the inner stages
Decisions = tuple[list[Tensor], list[Tensor]]  # p and b of every stage, the outermost first


class HNet(nn.Module):
    """A stage: an encoder, a router, the inner stages on a shorter sequence, and a decoder.

    The innermost stage is its layers alone. A stage wider than the one around it fills up with `pad_dimension`.
    """

    pad_dimension: nn.Parameter | None

    def __init__(self, config: Mapping[str, Any], arch: Arch, widths: list[int], around: int | None = None) -> None:
        super().__init__()
        width = widths[0]
        added = 0 if around is None else width - around
        self.register_parameter("pad_dimension", nn.Parameter(torch.zeros(added)) if added else None)
        if not arch.stages:
            self.main_network: nn.Module = Isotropic(arch.main, width, config["d_state"], config["attention_capacity"])
            return
        reach = config["attention_window"] + 1
        self.encoder = Isotropic(arch.encoders[0], width, config["d_state"], reach)
        self.routing_module = Router(width)
        self.residual_proj = nn.Linear(width, width)
        nn.init.zeros_(self.residual_proj.weight)
        self.main_network = HNet(config, arch.inner, widths[1:], around=width)
        self.decoder = Isotropic(arch.decoders[0], width, config["d_state"], reach)

    def draw_weights(self, branches: int = 0) -> None:
        """Draw dense weights; `branches` counts the residual branches of the stages around this one."""
        if isinstance(self.main_network, Isotropic):
            self.main_network.draw_weights(branches + self.main_network.branches)
            return
        branches += self.encoder.branches + self.decoder.branches
        self.encoder.draw_weights(branches)
        self.decoder.draw_weights(branches)
        assert isinstance(self.main_network, HNet)
        self.main_network.draw_weights(branches)

    def forward(self, x_BTD: Tensor, real_BT: Tensor, closed_BT: Tensor | None) -> tuple[Tensor, Decisions]:
        """The outputs of the stage at every position, and its decisions and those of the inner stages at its positions.

        No chunk begins where a position is not `real` or is `closed`, except the first of a row.
        """
        around = x_BTD.shape[-1]
        x_BTD = self._widen(x_BTD)
        if isinstance(self.main_network, Isotropic):
            return self.main_network(x_BTD)[..., :around], ([], [])
        x_BTD = self.encoder(x_BTD)
        p_BT = _open(self.routing_module(x_BTD), closed_BT) * real_BT
        b_BT = begins(p_BT)
        chunks = divide(b_BT)
        z_BKD, (p_inside, b_inside) = self.main_network(downsample(x_BTD, chunks), chunks.real, None)
        p_BK = downsample(p_BT[..., None], chunks)[..., 0]
        z_BTD = upsample(smooth(z_BKD, p_BK), chunks)
        y_BTD = z_BTD * confidence_gate(p_BT, b_BT)[..., None] + self._residual(x_BTD)
        # A chunk's decision is the decision at the position that begins it.
        p_inside = [torch.where(b_BT, upsample(p_BK[..., None], chunks)[..., 0], 0.0) for p_BK in p_inside]
        b_inside = [b_BT & upsample(b_BK[..., None], chunks)[..., 0] for b_BK in b_inside]
        return self.decoder(y_BTD)[..., :around], ([p_BT, *p_inside], [b_BT, *b_inside])

    def step(
        self, x_B1D: Tensor, closed_B1: Tensor | None, state: State, moved_B: Tensor | None = None
    ) -> tuple[Tensor, Decisions, State]:
        """One position of `forward` for every row, each at its own place.

        Rows that have not `moved` have no valid outputs, and their rings are unchanged.
        """
        around = x_B1D.shape[-1]
        x_B1D = self._widen(x_B1D)
        if isinstance(self.main_network, Isotropic):
            y_B1D, state = self.main_network.step(x_B1D, state, moved_B)
            return y_B1D[..., :around], ([], []), state
        x_B1D, encoder = self.encoder.step(x_B1D, part(state, "encoder_"), moved_B)
        p_B1 = self.routing_module.step(x_B1D, state["router"], state["started"])
        p_B1 = _open(p_B1, closed_B1, state["started"])
        b_B1 = begins(p_B1) if moved_B is None else begins(p_B1) & moved_B[:, None]
        average_B1D, inside, main = self._advance(x_B1D, p_B1, b_B1, state["average"], part(state, INNER))
        y_B1D, decoder = self.decoder.step(average_B1D + self._residual(x_B1D), part(state, "decoder_"), moved_B)
        after = {
            **named(encoder, "encoder_"),
            "router": self.routing_module.earlier(x_B1D),
            "started": state["started"].clamp_min(1),
            **named(main, INNER),
            "average": average_B1D,
            **named(decoder, "decoder_"),
        }
        return y_B1D[..., :around], ([p_B1, *inside[0]], [b_B1, *inside[1]]), after

    def _advance(
        self, x_B1D: Tensor, p_B1: Tensor, b_B1: Tensor, average_B1D: Tensor, state: State
    ) -> tuple[Tensor, Decisions, State]:
        """The average of chunks, the inner decisions and the inner state; unchanged for rows where no chunk begins.

        The inner stages run for the rows where a chunk begins only. While a model is traced, they run for all rows if a
        chunk begins in any of them, and are skipped otherwise.
        """
        assert isinstance(self.main_network, HNet)
        if torch.compiler.is_compiling() or current_form():
            return self._advance_traced(x_B1D, p_B1, b_B1, average_B1D, state)
        rows = b_B1[:, 0].nonzero()[:, 0]
        p, b = self._nothing(p_B1, b_B1)
        if not len(rows):
            return average_B1D, (p, b), state
        if len(rows) == len(b_B1):  # all rows are selected
            z_B1D, decisions, state = self.main_network.step(x_B1D, None, state)
            return smooth_step(z_B1D, p_B1, average_B1D), decisions, state
        now = {name: tensor[rows] for name, tensor in state.items()}
        z_B1D, (p_rows, b_rows), after = self.main_network.step(x_B1D[rows], None, now)
        averages = smooth_step(z_B1D, p_B1[rows], average_B1D[rows])
        p = [all_.index_copy(0, rows, some) for all_, some in zip(p, p_rows, strict=True)]
        b = [all_.index_copy(0, rows, some) for all_, some in zip(b, b_rows, strict=True)]
        state = {name: tensor.index_copy(0, rows, after[name]) for name, tensor in state.items()}
        return average_B1D.index_copy(0, rows, averages), (p, b), state

    def _advance_traced(
        self, x_B1D: Tensor, p_B1: Tensor, b_B1: Tensor, average_B1D: Tensor, state: State
    ) -> tuple[Tensor, Decisions, State]:
        inside, names, stages = self.main_network, list(state), self.stages - 1
        assert isinstance(inside, HNet)

        def run(x: Tensor, p_B1: Tensor, b_B1: Tensor, average: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            before, b_B = dict(zip(names, tensors, strict=True)), b_B1[:, 0]
            z, (p, b), after = inside.step(x, None, before, b_B)
            average = torch.where(b_B1[..., None], smooth_step(z, p_B1, average), average)
            moved = [after[name] if is_ring(name) else torch.where(_wide(b_B, before[name]), after[name], before[name])
                     for name in names]  # fmt: skip
            return average.contiguous(), *(each * b_B1 for each in p), *b, *moved

        def stay(x: Tensor, p_B1: Tensor, b_B1: Tensor, average: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            p, b = self._nothing(p_B1, b_B1)
            return average.clone(), *p, *b, *(tensor.clone() for tensor in tensors)

        average_B1D, *rest = torch.cond(b_B1.any(), run, stay, (x_B1D, p_B1, b_B1, average_B1D, *state.values()))
        after = dict(zip(names, rest[2 * stages :], strict=True))
        return average_B1D, (rest[:stages], rest[stages : 2 * stages]), after

    def _nothing(self, p_B1: Tensor, b_B1: Tensor) -> Decisions:
        """The inner decisions where no chunk begins."""
        stages = self.stages - 1
        return [torch.zeros_like(p_B1) for _ in range(stages)], [torch.zeros_like(b_B1) for _ in range(stages)]

    @property
    def stages(self) -> int:
        return 1 + self.main_network.stages if isinstance(self.main_network, HNet) else 0

    def _widen(self, x: Tensor) -> Tensor:
        if self.pad_dimension is None:
            return x
        return torch.cat([x, self.pad_dimension.to(x.dtype).expand(*x.shape[:-1], -1)], -1)

    def _residual(self, x: Tensor) -> Tensor:
        with in_float32(x):
            layer = self.residual_proj
            return nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float())


def _open(p: Tensor, closed: Tensor | None, started: Tensor | None = None) -> Tensor:
    """p, with 0 where `closed` except at the first position of a row."""
    if closed is None:
        return p
    if started is not None:
        return torch.where(closed & (started > 0), 0.0, p)
    first = torch.arange(p.shape[1], device=p.device) == 0
    return torch.where(closed & ~first, 0.0, p)


def _wide(b_B: Tensor, like: Tensor) -> Tensor:
    """b with as many axes as `like`."""
    return b_B.view(-1, *[1] * (like.dim() - 1))


def part(state: State, prefix: str) -> State:
    """The states whose names have this prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def named(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


class HNetForCausalLM(nn.Module):
    """Embedded bytes through a stage to logits of the byte that follows."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        arch, widths = check(config)
        self.align = config["align"] == "utf8"
        self.shapes, self.integers = state_shapes(config), integer_states(config)
        self.embeddings = nn.Embedding(VOCABULARY, widths[0])
        self.backbone = HNet(config, arch, widths)
        self.lm_head = nn.Linear(widths[0], VOCABULARY, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self.backbone.draw_weights()

    def forward(self, byte_ids_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits float32 [B, T, V]; of every stage p float32 and b bool [B, T, S], both at bytes.

        The first `lengths` bytes of a row are real; padding changes nothing before it and begins no chunk. A byte
        that begins no chunk of a stage begins none of an inner stage.
        """
        place_T = torch.arange(byte_ids_BT.shape[1], device=byte_ids_BT.device)
        closed = is_continuation(byte_ids_BT) if self.align else None
        x_BTD, (p, b) = self.backbone(self.embeddings(byte_ids_BT), place_T < lengths_B[:, None], closed)
        p_BTS = torch.stack(p, -1) if p else x_BTD.new_zeros(*byte_ids_BT.shape, 0)
        return self.lm_head(x_BTD).float(), p_BTS, torch.stack(b, -1) if b else p_BTS > 0

    def step(self, byte_ids_B: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        """One byte of every row: logits [B, V], p and b [B, S], and the next state; the given state is not changed."""
        logits_B1V, p_B1S, b_B1S, state = self.read(byte_ids_B[:, None], state)
        return logits_B1V[:, 0], p_B1S[:, 0], b_B1S[:, 0], state

    def read(self, byte_ids_B1: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor, State]:
        """`step` with an axis of time, along which there is one byte."""
        closed = is_continuation(byte_ids_B1) if self.align else None
        x_B1D, (p, b), state = self.backbone.step(self.embeddings(byte_ids_B1), closed, state)
        p_B1S = torch.stack(p, -1) if p else x_B1D.new_zeros(*byte_ids_B1.shape, 0)
        return self.lm_head(x_B1D).float(), p_B1S, torch.stack(b, -1) if b else p_B1S > 0, state

    def zero_state(self, rows: int) -> State:
        """The state before the first byte."""
        device = self.embeddings.weight.device
        return {
            name: torch.zeros(
                rows, *shape, dtype=torch.int64 if name in self.integers else torch.float32, device=device
            )
            for name, shape in self.shapes.items()
        }


def is_continuation(byte_ids: Tensor) -> Tensor:
    """Where a byte is inside a UTF-8 code point: 10xxxxxx."""
    return (byte_ids >= 0x80) & (byte_ids < 0xC0)
