"""What a policy learns from: a loss at every position, a state from the batch before, metrics that a loop confirms."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtimes.pipelines.policy.melee import BUTTONS, HEADS
from training.models.policy.data import synthetic_games
from training.models.policy.recipe import PolicyWithLoss, majority_logits, measure, policy_loss, stream_game
from training.models.policy.settings import TIME_MAX
from training.spec import find_spec

MODEL = "policy_gru"
METRICS = [f"{head}_{kind}" for head in HEADS for kind in ("accuracy", "nats")]


def some_logits(batch: int, time: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {head: torch.randn(batch, time, classes) for head, classes in HEADS.items()}


def some_labels(batch: int, time: int) -> Tensor:
    rng = np.random.default_rng(0)
    sizes = [256, *list(HEADS.values())[1:]]
    return torch.from_numpy(np.stack([rng.integers(0, size, (batch, time)) for size in sizes], -1).astype(np.uint8))


def loop_loss(logits: dict[str, Tensor], labels: Tensor, button_weight: float) -> float:
    """Position by position and number by number, in Python floats."""
    batch, time, _ = labels.shape
    total = 0.0
    for b in range(batch):
        for t in range(time):
            packed, *buckets = labels[b, t].tolist()
            for i in range(len(BUTTONS)):
                share = 1 / (1 + math.exp(-logits["buttons"][b, t, i].item()))
                total -= button_weight / len(BUTTONS) * math.log(share if packed >> i & 1 else 1 - share)
            for head, bucket in zip(list(HEADS)[1:], buckets, strict=True):
                scores = [math.exp(score) for score in logits[head][b, t].tolist()]
                total -= math.log(scores[bucket] / sum(scores))
    return total / (batch * time)


def test_the_loss_is_that_of_a_loop_over_every_position() -> None:
    logits, labels = some_logits(3, 5), some_labels(3, 5)
    training = {"button_weight": 2.0, "label_smoothing": 0.0}
    assert policy_loss(logits, labels, training).item() == pytest.approx(loop_loss(logits, labels, 2.0), rel=1e-5)


def test_every_position_of_every_head_has_a_gradient() -> None:
    logits = {head: values.requires_grad_() for head, values in some_logits(2, 7).items()}
    policy_loss(logits, some_labels(2, 7), {"button_weight": 2.0, "label_smoothing": 0.0}).backward()
    for head, values in logits.items():
        assert values.grad is not None
        assert (values.grad.abs().sum(-1) > 0).all(), head


def with_loss(**changes: Any) -> tuple[PolicyWithLoss, dict[str, Any]]:
    spec = find_spec(MODEL)
    torch.manual_seed(0)
    config = {**spec.preset("tiny"), **changes}
    return PolicyWithLoss(spec.interface.build(config), config, spec.training.settings["tiny"]), config


def test_the_state_carried_is_what_the_batch_before_left_and_zero_where_it_is_not() -> None:
    model, _ = with_loss()
    games = synthetic_games(0, 3, 61)
    x = torch.from_numpy(np.stack([game.frames for game in games]))
    labels = torch.from_numpy(np.stack([game.labels for game in games]))
    first, second = slice(0, 30), slice(30, 60)
    model.train()
    model(frames=x[:, first], labels=labels[:, first], carried=torch.tensor([False] * 3))
    loss = model(frames=x[:, second], labels=labels[:, second], carried=torch.tensor([True, False, True]))["loss"]

    zero = torch.zeros(1, 1, 64)
    want = []
    for row, carried in enumerate((True, False, True)):
        state = model.policy(x[row : row + 1, first], zero)[-1] if carried else zero
        want.append([logits[0] for logits in model.policy(x[row : row + 1, second], state)[:-1]])
    logits = {head: torch.stack(rows) for head, rows in zip(HEADS, zip(*want, strict=True), strict=True)}
    assert loss.item() == pytest.approx(
        policy_loss(logits, labels[:, second], model.training_settings).item(), rel=1e-5
    )
    all_fresh = model(frames=x[:, second], labels=labels[:, second], carried=torch.tensor([False] * 3))["loss"]
    assert abs(loss.item() - all_fresh.item()) > 1e-5


def test_gradients_end_at_the_batch_and_judging_leaves_the_state_alone() -> None:
    model, _ = with_loss()
    x, labels = torch.from_numpy(synthetic_games(0, 1, 31)[0].frames[None]), some_labels(1, 30)
    model.train()
    model(frames=x, labels=labels, carried=torch.tensor([False]))
    assert model.state is not None
    assert not any(tensor.requires_grad for tensor in model.state)
    before = [tensor.clone() for tensor in model.state]
    model.eval()
    with torch.no_grad():
        judged = model(frames=x, labels=labels, carried=torch.tensor([True]))["loss"]
        again = model(frames=x, labels=labels, carried=torch.tensor([False]))["loss"]
    assert judged == again, "windows are judged from a zero state"
    assert all(torch.equal(one, other) for one, other in zip(model.state, before, strict=True))


def test_a_diverged_row_does_not_poison_the_row_that_begins_after_it() -> None:
    model, _ = with_loss()
    x, labels = torch.from_numpy(synthetic_games(0, 1, 31)[0].frames[None]), some_labels(1, 30)
    model.train()
    model.state = (torch.full((1, 1, 64), math.inf),)
    assert model(frames=x, labels=labels, carried=torch.tensor([False]))["loss"].isfinite()


@pytest.mark.parametrize("piece", [1, 30, 300, 1000, 5000])
def test_a_game_is_judged_once_however_it_is_cut(piece: int) -> None:
    model, config = with_loss()
    game = synthetic_games(0, 1, 1300)[0]
    model.eval()
    streamed = stream_game(model.policy, config, game.frames, piece, carried=True)
    with torch.no_grad():
        whole = model.policy(torch.from_numpy(game.frames[None]), torch.zeros(1, 1, 64))
    for head, want in zip(HEADS, whole, strict=False):
        torch.testing.assert_close(streamed[head], want[0], rtol=1e-4, atol=1e-5)
    windowed = stream_game(model.policy, config, game.frames, piece, carried=False)
    assert len(windowed["main_x"]) == len(game.frames)
    start = min(piece, TIME_MAX)
    with torch.no_grad():
        second = model.policy(torch.from_numpy(game.frames[None, start : start + 1]), torch.zeros(1, 1, 64))
    torch.testing.assert_close(windowed["main_x"][start], second[1][0, 0], rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_a_loop() -> None:
    logits, labels = {head: values[0] for head, values in some_logits(1, 40).items()}, some_labels(1, 40)[0]
    metrics = measure(logits, labels)
    assert list(metrics) == METRICS
    hits = [int(logits["c_y"][t].argmax()) == int(labels[t, 4]) for t in range(40)]
    nats = [-float(logits["c_y"][t].log_softmax(-1)[int(labels[t, 4])]) for t in range(40)]
    assert metrics["c_y_accuracy"] == pytest.approx(sum(hits) / 40)
    assert metrics["c_y_nats"] == pytest.approx(sum(nats) / 40, rel=1e-5)
    pressed = [[int(labels[t, 0]) >> i & 1 for i in range(8)] for t in range(40)]
    right = [(logits["buttons"][t, i] > 0) == bool(pressed[t][i]) for t in range(40) for i in range(8)]
    assert metrics["buttons_accuracy"] == pytest.approx(sum(map(bool, right)) / 320)


def test_the_majority_says_the_commonest_class_with_its_frequency() -> None:
    labels = np.zeros((100, 6), np.uint8)
    labels[:70, 1], labels[70:, 1] = 16, 3
    labels[:60, 0] = 0b101
    logits = majority_logits(labels, 5)
    assert logits["main_x"].shape == (5, 17)
    assert (logits["main_x"].argmax(-1) == 16).all()
    assert logits["main_x"][0].exp()[16] == pytest.approx(71 / 117)
    assert logits["main_x"][0].exp().sum() == pytest.approx(1)
    assert logits["buttons"][0].sigmoid().tolist() == pytest.approx([61 / 102, 1 / 102, 61 / 102, *[1 / 102] * 5])
