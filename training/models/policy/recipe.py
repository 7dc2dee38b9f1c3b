"""Training of the policies: a loss over every position of a window, and state carried from window to window.

Shapes: B batch, T time, F frame width, C classes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtimes.errors import InputError
from runtimes.pipelines.policy.melee import BUTTONS, HEADS
from runtimes.tensors import Tensors
from training.config import Config, Metrics
from training.models.policy.data import Game, read_replays, split_by_game, synthetic_games
from training.models.policy.settings import TIME_MAX
from training.models.policy.signature import signature
from training.models.policy.windows import FrameTable, WindowDataset, Windows
from training.recipe import Evaluation, Recipe

SAMPLE_GAMES, SAMPLE_FRAMES = 4, 320
STREAM_PIECE = 256  # frames of one call when a stream is evaluated


class PolicyRecipe(Recipe):
    """Windows from one table of frames, in an order by formula; games are held out whole."""

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        super().__init__(config, training, data)
        self.skipped: list[tuple[Path, str]] = []
        if data is None:
            games = synthetic_games(training["seed"], training["games"], training["frames"])
        else:
            games, self.skipped = read_replays(data, delay=training["delay"])
        train, self.valid = split_by_game(games, training["valid_share"], training["seed"])
        if not self.valid:
            raise InputError(f"valid_share: expected games to evaluate on, found none with {training['valid_share']}")
        self.train_games = len(train)
        self.train_labels = np.concatenate([game.labels for game in train])
        self._train = train  # until they are copied into the table

    def summary(self) -> list[str]:
        held_out = sum(len(game.frames) for game in self.valid)
        lines = [
            f"{self.train_games} games to train on ({len(self.train_labels)} frames), "
            f"{len(self.valid)} held out ({held_out} frames)"
        ]
        lines += [f"skipped {path.name}: {reason}" for path, reason in self.skipped]
        return [*lines, f"{len(self.skipped)} replays skipped"] if self.skipped else lines

    def module_with_loss(self, module: nn.Module) -> nn.Module:
        return PolicyWithLoss(module, self.config, self.training)

    def datasets(self, step_rows: int) -> tuple[WindowDataset, WindowDataset]:
        train = WindowDataset(
            self._windows(self._train),
            carry=self.training["carry"],
            step_rows=step_rows,
            seed=self.training["seed"],
            shift=True,
        )
        return train, WindowDataset(self._windows(list(self.valid)), shuffle=False)

    def _windows(self, games: list[Game]) -> Windows:
        """Windows over a table of `games`, which is left empty."""
        dtype = torch.float16 if self.training["half_table"] else torch.float32
        length = self.training["window"]
        return Windows(FrameTable.from_games(games, dtype), length, stride=length, mode=self.training["windows"])

    def evaluate(self, module: nn.Module) -> Evaluation:
        """Windowed: each window from a zero state. Streamed: each game with one carried state."""
        window = self.training["window"]
        labels = torch.from_numpy(np.concatenate([game.labels for game in self.valid]))
        windowed = [stream_game(module, self.config, game.frames, window, carried=False) for game in self.valid]
        streamed = [stream_game(module, self.config, game.frames, STREAM_PIECE, carried=True) for game in self.valid]
        metrics = {
            **{f"windowed_{name}": value for name, value in measure(_join(windowed), labels).items()},
            **{f"streamed_{name}": value for name, value in measure(_join(streamed), labels).items()},
        }
        majority = measure(majority_logits(self.train_labels, len(labels)), labels)
        baseline = {f"{way}_{name}": value for way in ("windowed", "streamed") for name, value in majority.items()}
        return Evaluation(metrics=metrics, baselines={"majority": baseline})

    def sample_inputs(self) -> Tensors:
        """Frames float32 [games, time, 287] from the start of held-out games, all of one length."""
        chosen = sorted(self.valid, key=lambda game: -len(game.frames))[:SAMPLE_GAMES]
        length = min(SAMPLE_FRAMES, min(len(game.frames) for game in chosen))
        return {"frames": np.stack([game.frames[:length] for game in chosen])}


class PolicyWithLoss(nn.Module):
    """A policy with its loss over every position, and the state of each row from one batch to the next."""

    def __init__(self, policy: nn.Module, config: Config, training: Config) -> None:
        super().__init__()
        self.policy, self.training_settings = policy, training
        self.signature = signature(config)
        self.state: tuple[Tensor, ...] | None = None
        self.checkpointing = False

    def gradient_checkpointing_enable(self, **_: Any) -> None:
        """Called by the Trainer: the activations of a window are recomputed in the backward pass from now on."""
        self.checkpointing = True

    def forward(self, frames: Tensor, labels: Tensor, carried: Tensor) -> dict[str, Tensor]:
        state = self._state_for(frames, carried)
        if self.checkpointing and self.training:
            outputs = checkpoint(self.policy, frames, *state, use_reentrant=False)
        else:
            outputs = self.policy(frames, *state)
        logits, after = split_outputs(outputs)
        if self.training:
            self.state = tuple(tensor.detach() for tensor in after)
        return {"loss": policy_loss(logits, labels, self.training_settings)}

    def _state_for(self, frames_BTF: Tensor, carried_B: Tensor) -> tuple[Tensor, ...]:
        """The state at the end of each row where `carried`; zero elsewhere, and in evaluation."""
        batch = len(frames_BTF)
        if not self.training or self.state is None or len(self.state[0]) != batch:
            zeros = self.signature.zero_state(batch)
            return tuple(torch.from_numpy(array).to(frames_BTF.device) for array in zeros.values())
        rows = carried_B.to(frames_BTF.device)
        # A choice and no product: infinity times zero is NaN, which would reach the next game of a diverged row.
        return tuple(torch.where(rows.view(-1, *[1] * (tensor.ndim - 1)), tensor, 0) for tensor in self.state)


def split_outputs(outputs: tuple[Tensor, ...]) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """(logits by head, state) from the outputs of a policy."""
    return dict(zip(HEADS, outputs[: len(HEADS)], strict=True)), outputs[len(HEADS) :]


def policy_loss(logits: Mapping[str, Tensor], labels_BTL: Tensor, training: Mapping[str, Any]) -> Tensor:
    """Weighted mean cross-entropy of the buttons plus that of each stick and the shoulder, in nats."""
    pressed, buckets = targets(labels_BTL)
    loss = training["button_weight"] * F.binary_cross_entropy_with_logits(logits["buttons"].float(), pressed)
    for name, bucket in buckets.items():
        loss = loss + F.cross_entropy(
            logits[name].float().flatten(0, -2), bucket.flatten(), label_smoothing=training["label_smoothing"]
        )
    return loss


def targets(labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Pressed buttons float [..., 8] and buckets int64 [...] by head, from packed labels uint8 [..., 6]."""
    bits = torch.arange(len(BUTTONS), device=labels.device)
    pressed = (labels[..., :1].long() >> bits & 1).float()
    return pressed, {name: labels[..., i].long() for i, name in enumerate(HEADS) if i}


def stream_game(
    module: nn.Module, config: Config, frames: np.ndarray, piece: int, *, carried: bool
) -> dict[str, Tensor]:
    """Logits [F, C] by head for a whole game in pieces, each from the state of the last or from zero."""
    zero = tuple(torch.from_numpy(array) for array in signature(config).zero_state(1).values())
    piece, state, parts = min(piece, TIME_MAX), zero, []
    with torch.inference_mode():
        for start in range(0, len(frames), piece):
            part = torch.from_numpy(frames[None, start : start + piece])
            logits, state = split_outputs(module(part, *(state if carried else zero)))
            parts.append({name: values[0] for name, values in logits.items()})
    return _join(parts)


def _join(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in HEADS}


def measure(logits: Mapping[str, Tensor], labels: Tensor) -> Metrics:
    """Accuracy and cross-entropy in nats of each head, over all positions [F]; for buttons the mean over buttons."""
    pressed, buckets = targets(labels)
    metrics = {
        "buttons_accuracy": ((logits["buttons"] > 0) == pressed.bool()).float().mean().item(),
        "buttons_nats": F.binary_cross_entropy_with_logits(logits["buttons"], pressed).item(),
    }
    for name, bucket in buckets.items():
        metrics[f"{name}_accuracy"] = (logits[name].argmax(-1) == bucket).float().mean().item()
        metrics[f"{name}_nats"] = F.cross_entropy(logits[name], bucket).item()
    return metrics


def majority_logits(labels: np.ndarray, rows: int) -> dict[str, Tensor]:
    """Log frequencies of the classes in training, the same at every position."""
    pressed, buckets = targets(torch.from_numpy(labels))
    share = (pressed.mean(0) * len(labels) + 1) / (len(labels) + 2)  # add-one: a class may be missing from training
    result = {"buttons": torch.logit(share).expand(rows, -1)}
    for name, bucket in buckets.items():
        counts = torch.bincount(bucket, minlength=HEADS[name]).float() + 1
        result[name] = (counts / counts.sum()).log().expand(rows, -1)
    return result
