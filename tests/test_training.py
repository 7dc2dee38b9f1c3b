"""Training from the command line: what is learned, what is reported, what is refused, and what is carried over."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtimes.melee import BUTTONS, HEADS
from training import evaluate, run
from training.checkpoint import Checkpoint, restore
from training.models.policy import recipe as recipe_module
from training.models.policy.data import synthetic_games
from training.models.policy.recipe import PolicyRecipe, Trainee, majority_logits, measure, policy_loss, stream_game
from training.models.policy.spec import TIME_MAX
from training.spec import ModelSpec, all_specs, find_spec

MODEL = "policy_gru"
SMALL = {"games": "4", "frames": "300", "epochs": "1"}
METRICS = [f"{head}_{kind}" for head in HEADS for kind in ("accuracy", "nats")]


def sets(**settings: object) -> list[str]:
    return [part for name, value in {**SMALL, **settings}.items() for part in ("--set", f"{name}={value}")]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    """The one line that the command says before it ends with this status."""
    capsys.readouterr()
    assert run.main(list(arguments)) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of one short training from the command line."""
    out = tmp_path_factory.mktemp("out")
    assert run.main([MODEL, *sets(), "--out", str(out)]) == 0
    return out / MODEL


def test_a_short_training_ends_in_a_checkpoint_that_loads(trained: Path) -> None:
    checkpoint = Checkpoint.load(trained)
    assert (checkpoint.model, checkpoint.preset) == (MODEL, "tiny")
    assert checkpoint.step > 0
    module = restore(checkpoint, find_spec(MODEL))
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    signature = find_spec(MODEL).signature(checkpoint.config)
    probe = checkpoint.probe()
    signature.check_inputs({**probe, **signature.zero_state(len(probe["frames"]))})


def test_training_moves_every_parameter_but_those_without_a_gradient(trained: Path) -> None:
    import transformers

    spec = find_spec(MODEL)
    transformers.set_seed(spec.preset("tiny").training["seed"])
    before = spec.build(spec.preset("tiny").config).state_dict()
    after = restore(Checkpoint.load(trained), spec).state_dict()
    still = [name for name in before if torch.equal(before[name], after[name])]
    assert still == []


def test_metrics_are_windowed_and_streamed_for_every_head(trained: Path) -> None:
    metrics = Checkpoint.load(trained).metrics
    assert list(metrics) == [f"{way}_{name}" for way in ("windowed", "streamed") for name in METRICS]
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_table_has_the_majority_beside_every_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([MODEL, *sets(), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(i for i, line in enumerate(lines) if line.split() == ["metric", "model", "majority"])
    rows = [line.split() for line in lines[header + 2 :]]
    assert [row[0] for row in rows] == [f"{way}_{name}" for way in ("windowed", "streamed") for name in METRICS]
    assert all(re.fullmatch(r"\d+\.\d{4}", cell) for row in rows for cell in row[1:])
    assert all(len(row) == 3 for row in rows)


def test_evaluate_prints_the_documented_json_and_what_training_reported(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert evaluate.main([MODEL, "--checkpoint", str(trained), *sets(), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed) == ["model", "metrics", "baselines"]
    assert printed["model"] == MODEL
    assert printed["metrics"] == pytest.approx(dict(Checkpoint.load(trained).metrics), rel=1e-5)
    assert printed["baselines"].keys() == {"majority"}
    assert printed["baselines"]["majority"].keys() == printed["metrics"].keys()


def test_two_runs_with_one_seed_are_the_same_run(trained: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        assert run.main([MODEL, *sets(seed=seed), "--out", str(tmp_path)]) == 0
        again = Checkpoint.load(tmp_path / MODEL)
        assert (again.digest == Checkpoint.load(trained).digest) is same


@pytest.mark.parametrize("settings", [{"windows": "lazy"}, {"windows": "eager"}])
def test_lazy_and_eager_windows_learn_the_same(trained: Path, tmp_path: Path, settings: dict[str, str]) -> None:
    flag = [f"--{part}" if i == 0 else part for item in settings.items() for i, part in enumerate(item)]
    assert run.main([MODEL, *sets(), "--out", str(tmp_path), *flag]) == 0
    assert Checkpoint.load(tmp_path / MODEL).digest == Checkpoint.load(trained).digest


def test_a_model_with_a_checkpoint_is_left_alone_if_asked(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (trained / "checkpoint.json").stat().st_mtime_ns
    assert run.main([MODEL, *sets(), "--out", str(trained.parent), "--if-missing"]) == 0
    assert (trained / "checkpoint.json").stat().st_mtime_ns == before


# The loss and what it is carried over --------------------------------------------------------------------------------


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


def trainee(**changes: Any) -> tuple[Trainee, dict[str, Any]]:
    spec = find_spec(MODEL)
    torch.manual_seed(0)
    preset = spec.preset("tiny")
    config = {**preset.config, **changes}
    return Trainee(spec.build(config), config, preset.training), config


def test_the_state_carried_is_what_the_batch_before_left_and_zero_where_it_is_not() -> None:
    model, _ = trainee()
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
    model, _ = trainee()
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
    model, _ = trainee()
    x, labels = torch.from_numpy(synthetic_games(0, 1, 31)[0].frames[None]), some_labels(1, 30)
    model.train()
    model.state = (torch.full((1, 1, 64), math.inf),)
    assert model(frames=x, labels=labels, carried=torch.tensor([False]))["loss"].isfinite()


@pytest.mark.parametrize("piece", [1, 30, 300, 1000, 5000])
def test_a_game_is_judged_once_however_it_is_cut(piece: int) -> None:
    model, config = trainee()
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


# Going on ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [MODEL, *sets(epochs=3)]
    assert run.main([*arguments, "--out", str(tmp_path / "whole"), "--work", str(tmp_path / "w1")]) == 0
    whole = Checkpoint.load(tmp_path / "whole" / MODEL)
    forward, calls, last = Trainee.forward, 0, whole.step // 2  # in the second of three epochs

    def counted(self: Trainee, frames: Tensor, labels: Tensor, carried: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += self.training
        if calls > last:
            raise KeyboardInterrupt
        return forward(self, frames, labels, carried)

    monkeypatch.setattr(Trainee, "forward", counted)
    assert run.main([*arguments, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w2")]) == 130
    assert not (tmp_path / "out").exists(), "half a training is no checkpoint"
    calls, last = 0, whole.step
    assert run.main([*arguments, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "w2"), "--resume"]) == 0
    assert calls == whole.step * 2 // 3, "the first epoch is not trained again"
    resumed = Checkpoint.load(tmp_path / "out" / MODEL)
    assert resumed.step == whole.step
    want = restore(whole, find_spec(MODEL)).state_dict()
    for name, tensor in restore(resumed, find_spec(MODEL)).state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)


def test_the_step_of_a_checkpoint_is_that_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Worsening(Trainee):
        """Judged the worse the longer it trains, so that the first epoch is the best."""

        judged = 0

        def forward(self, frames: Tensor, labels: Tensor, carried: Tensor) -> dict[str, Tensor]:
            if self.training:
                return super().forward(frames, labels, carried)
            self.judged += 1
            return {"loss": torch.tensor(float(self.judged))}

    monkeypatch.setattr(recipe_module, "Trainee", Worsening)
    assert run.main([MODEL, *sets(epochs=3, patience=2), "--out", str(tmp_path), "--work", str(tmp_path / "w")]) == 0
    states = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "w" / MODEL).glob("checkpoint-*"))
    assert Checkpoint.load(tmp_path / MODEL).step == states[0] < states[-1]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy_rnn"], "expected a model of policy_attention, .*; found 'policy_rnn'"),
        ([MODEL, "--preset", "huge"], "expected a preset of tiny, full; found 'huge'"),
        ([MODEL, "--set", "speed=9"], "expected a setting of .*; found 'speed'"),
        ([MODEL, "--speed", "9"], "expected a setting of .*; found 'speed'"),
        ([MODEL, "--set", "lr"], "expected NAME=VALUE, found 'lr'"),
        ([MODEL, "--set", "lr=fast"], "--set lr: expected float such as .*, found 'fast'"),
        ([MODEL, "--set", "lr=nan"], "--set lr: expected float such as .*, found 'nan'"),
        ([MODEL, "--set", "batch=1.5"], "--set batch: expected int such as 16, found '1.5'"),
        ([MODEL, "--set", "batch=0"], "--set batch: expected a number above 0, found 0"),
        ([MODEL, "--set", "epochs=-1"], "--set epochs: expected a number above 0, found -1"),
        ([MODEL, "--set", "seed=-1"], "--set seed: expected 0 or more, found -1"),
        ([MODEL, "--set", "half_table=maybe"], "--set half_table: expected bool such as False, found 'maybe'"),
        ([MODEL, "--data", "/nowhere/replays"], "expected a folder of .slp replays at /nowhere/replays, found nothing"),
        ([MODEL, "--resume"], "--resume: expected states of an earlier run in --work, found none"),
        ([MODEL, "--resume", "--work", "/nowhere"], "--resume: expected states .* found none in /nowhere"),
        ([MODEL, "--windows"], "expected --NAME VALUE, found '--windows'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert re.search(message, refused(capsys, *arguments, "--out", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "setting", "message"),
    [
        ("policy_attention", "heads=3", "expected hidden to be a multiple of 2 x heads"),
        ("policy_jamba", "attention_every=0", "expected a Jamba with both kinds of layers"),
        ("policy_mamba", "layers=0", "expected layers of 1 or more"),
        ("policy_lstm", "backbone=rnn", "expected a backbone of lstm, .*; found 'rnn'"),
        ("policy_attention", "dropout=1", "expected a dropout in"),
        ("policy_gru", "window=0", "expected a window and a stride of 1 or more"),
        ("policy_gru", "windows=slow", "expected mode lazy, eager or auto, found 'slow'"),
        ("policy_gru", "valid_share=0", "valid_share: expected games to judge by, found none"),
        ("policy_gru", "games=1", "expected 2 or more replays"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, setting: str, message: str
) -> None:
    capsys.readouterr()
    assert run.main([model, *sets(), "--set", setting, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(f"error: .*{message}", error)
    assert not (tmp_path / model).exists()


def test_a_folder_without_replays_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peppi_py")
    (tmp_path / "broken.slp").write_bytes(b"not a replay")
    line = refused(capsys, MODEL, "--data", str(tmp_path))
    assert "expected at least one usable .slp replay" in line
    assert "broken.slp" in line


# What is learned -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "spec", [spec for spec in all_specs().values() if spec.pipeline == "policy"], ids=lambda s: s.name
)
def test_training_learns_and_a_long_stream_stays_as_good_as_windows(spec: ModelSpec, tmp_path: Path) -> None:
    arguments = [spec.name, *sets(games=10, frames=1000, epochs=3), "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    checkpoint = Checkpoint.load(tmp_path / spec.name)
    recipe = PolicyRecipe(checkpoint.config, {**spec.preset("tiny").training, "games": 10, "frames": 1000}, None)
    majority = recipe.evaluate(restore(checkpoint, spec)).baselines["majority"]
    metrics = checkpoint.metrics
    assert metrics["windowed_main_x_accuracy"] > majority["windowed_main_x_accuracy"] + 0.2
    assert metrics["windowed_main_x_nats"] < majority["windowed_main_x_nats"] - 0.2
    for head in HEADS:
        assert metrics[f"streamed_{head}_nats"] < metrics[f"windowed_{head}_nats"] + 0.05

    game = synthetic_games(9, 1, 6000)[0]
    logits = stream_game(restore(checkpoint, spec), checkpoint.config, game.frames, 500, carried=True)
    labels = torch.from_numpy(game.labels)
    early, late = (
        measure({head: values[part] for head, values in logits.items()}, labels[part])
        for part in (slice(0, 1000), slice(5000, None))
    )
    assert late["main_x_nats"] < early["main_x_nats"] + 0.1, "100 seconds of carried state are in distribution"


@pytest.mark.slow
def test_real_replays_train_a_policy(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peppi_py")
    arguments = [MODEL, "--data", str(data / "replays"), "--out", str(tmp_path), "--set", "epochs=1"]
    assert run.main(arguments) == 0
    assert "games to train on" in capsys.readouterr().err
    checkpoint = Checkpoint.load(tmp_path / MODEL)
    assert all(math.isfinite(value) for value in checkpoint.metrics.values())
    assert checkpoint.probe()["frames"].shape[0] >= 1
