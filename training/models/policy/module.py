"""Behavioural-cloning policies for Melee: five backbones between the same input layer and the same heads.

Shapes: B batch, T time, F frame width (287), E embedded width, H hidden, L layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runtimes.pipelines.policy.melee import ACTION_COUNT, CHARACTER_COUNT, COLUMNS, HEADS, ID_COLUMNS
from training.layers.rnn import run_cell
from training.models.policy.blocks import FeedForward, Mamba, WindowAttention

HEAD_WIDTHS = {"shoulder": 32}  # the other heads are 64 wide


class FrameInput(nn.Module):
    """Frames with their ids as learned embeddings: float [B, T, 287] becomes [B, T, 283 + 4 * width].

    With `previous_controller` off, the controller that led to a frame is not an input, so that the model cannot
    copy the last action instead of using the state of the game.
    """

    shown: Tensor

    def __init__(self, id_width: int, previous_controller: bool) -> None:
        super().__init__()
        self.action_embedding = nn.Embedding(ACTION_COUNT, id_width)
        self.character_embedding = nn.Embedding(CHARACTER_COUNT, id_width)
        shown = torch.ones(ID_COLUMNS)
        shown[COLUMNS["controller"]] = float(previous_controller)
        self.register_buffer("shown", shown, persistent=False)
        self.width = ID_COLUMNS + 4 * id_width

    def forward(self, frames_BTF: Tensor) -> Tensor:
        ids = frames_BTF[..., ID_COLUMNS:].long()
        actions = self.action_embedding(ids[..., :2].clamp(0, ACTION_COUNT - 1)).flatten(2)
        characters = self.character_embedding(ids[..., 2:].clamp(0, CHARACTER_COUNT - 1)).flatten(2)
        numbers = frames_BTF[..., :ID_COLUMNS].to(actions.dtype) * self.shown.to(actions.dtype)
        return torch.cat([numbers, actions, characters], -1)


class Recurrent(nn.Module):
    """LSTM or GRU between two layer norms. State: one [B, L, H] for each of the cell's states."""

    def __init__(self, width: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        cell = {"lstm": nn.LSTM, "gru": nn.GRU}[config["backbone"]]
        self.norm_in = nn.LayerNorm(width, eps=1e-6)
        self.cell = cell(width, config["hidden"], config["layers"], batch_first=True)
        self.norm_out = nn.LayerNorm(config["hidden"], eps=1e-6)

    def forward(self, x_BTE: Tensor, *state_BLH: Tensor) -> tuple[Tensor, ...]:
        x_BTE = self.norm_in(x_BTE)
        state_LBH = tuple(tensor.transpose(0, 1).to(x_BTE.dtype).contiguous() for tensor in state_BLH)
        x_BTH, last_LBH = run_cell(self.cell, x_BTE, state_LBH)
        return self.norm_out(x_BTH), *(tensor.transpose(0, 1).float() for tensor in last_LBH)


class Residual(nn.Module):
    """Pre-norm residual layers: a mixer ("mamba" or "attention") each, followed by an optional feed-forward part.

    State: conv and ssm [B, mamba layers, ...], keys and values [B, attention layers, W-1, H], seen [B, 1].
    """

    def __init__(self, width: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        hidden, dropout = config["hidden"], config["dropout"]
        self.kinds = layer_kinds(config)
        feed_forward = config["backbone"] != "mamba"
        self.dense = nn.Linear(width, hidden)
        self.mixer_norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in self.kinds)
        self.mixers = nn.ModuleList(self._mixer(kind, config) for kind in self.kinds)
        self.forward_norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in self.kinds if feed_forward)
        self.forwards = nn.ModuleList(FeedForward(hidden, dropout) for _ in self.kinds if feed_forward)
        self.dropout = nn.Dropout(dropout)
        self.norm_out = nn.LayerNorm(hidden)

    @staticmethod
    def _mixer(kind: str, config: Mapping[str, Any]) -> nn.Module:
        if kind == "mamba":
            return Mamba(config["hidden"])
        normalise = config["backbone"] == "jamba"  # without it Jamba's attention logits grow until they overflow
        return WindowAttention(
            config["hidden"], heads=config["heads"], window=config["attention_window"], normalise=normalise
        )

    def forward(self, x_BTE: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x_BTH, names = self.dense(x_BTE), state_names(self.kinds)
        before = dict(zip(names, state, strict=True))
        after: dict[str, list[Tensor]] = {name: [] for name in names}
        for i, (kind, norm, mixer) in enumerate(zip(self.kinds, self.mixer_norms, self.mixers, strict=True)):
            own = LAYER_STATE[kind]
            place = self.kinds[:i].count(kind)
            shared = [before["seen"]] if kind == "attention" else []
            mixed, *new = mixer(norm(x_BTH), *(before[name][:, place] for name in own), *shared)
            x_BTH = x_BTH + self.dropout(mixed)
            if len(self.forwards):
                x_BTH = x_BTH + self.forwards[i](self.forward_norms[i](x_BTH))
            for name, tensor in zip(own, new, strict=True):
                after[name].append(tensor)
        return self.norm_out(x_BTH), *self._collect(before, after, x_BTH.shape[1])

    def _collect(self, before: dict[str, Tensor], after: dict[str, list[Tensor]], time: int) -> list[Tensor]:
        result = []
        for name, tensors in after.items():
            if name == "seen":
                past = before["keys"].shape[2]
                result.append((before["seen"] + time).clamp(max=past))
            else:
                result.append(torch.stack(tensors, 1))
        return result


LAYER_STATE = {"mamba": ("conv", "ssm"), "attention": ("keys", "values")}


def layer_kinds(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The mixer of every layer: Jamba has attention in each `attention_every`-th layer (M M A M M A)."""
    if config["backbone"] != "jamba":
        return (config["backbone"],) * config["layers"]
    every = config["attention_every"]
    return tuple("attention" if i % every == every - 1 else "mamba" for i in range(config["layers"]))


def state_names(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """The state tensors that layers of these kinds have, in the order of the signature."""
    names = [name for kind, own in LAYER_STATE.items() if kind in kinds for name in own]
    return (*names, "seen") if "attention" in kinds else tuple(names)


class Policy(nn.Module):
    """Frames and state in; logits for every position, head by head, and the next state out."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.input = FrameInput(config["id_width"], config["previous_controller"])
        backbone = Recurrent if config["backbone"] in ("lstm", "gru") else Residual
        self.backbone = backbone(self.input.width, config)
        self.heads = nn.ModuleDict({name: _head(name, classes, config["hidden"]) for name, classes in HEADS.items()})

    def forward(self, frames_BTF: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        hidden_BTH, *state_out = self.backbone(self.input(frames_BTF), *state)
        return *(head(hidden_BTH).float() for head in self.heads.values()), *state_out


def _head(name: str, classes: int, hidden: int) -> nn.Module:
    width = HEAD_WIDTHS.get(name, 64)
    return nn.Sequential(nn.Linear(hidden, width), nn.ReLU(), nn.Linear(width, classes))
