"""Training from the command line: what is learned, what is reported, what is refused, and what is carried over."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from runtimes.pipelines.policy.melee import HEADS
from training import evaluate, run
from training.checkpoint import Checkpoint, restore
from training.models.policy import recipe as recipe_module
from training.models.policy.data import synthetic_games
from training.models.policy.recipe import PolicyRecipe, PolicyWithLoss, measure, stream_game
from training.settings import configure
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
    signature = find_spec(MODEL).interface.signature(checkpoint.config)
    sample_inputs = checkpoint.sample_inputs()
    signature.check_inputs({**sample_inputs, **signature.zero_state(len(sample_inputs["frames"]))})


def test_training_moves_every_parameter_but_those_without_a_gradient(trained: Path) -> None:
    import transformers

    spec = find_spec(MODEL)
    config, training = configure(spec, "tiny", {})
    transformers.set_seed(training["seed"])
    before = spec.interface.build(config).state_dict()
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


# Going on ------------------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [MODEL, *sets(epochs=3)]
    assert run.main([*arguments, "--out", str(tmp_path / "whole"), "--state-dir", str(tmp_path / "w1")]) == 0
    whole = Checkpoint.load(tmp_path / "whole" / MODEL)
    forward, calls, last = PolicyWithLoss.forward, 0, whole.step // 2  # in the second of three epochs

    def counted(self: PolicyWithLoss, frames: Tensor, labels: Tensor, carried: Tensor) -> dict[str, Tensor]:
        nonlocal calls
        calls += self.training
        if calls > last:
            raise KeyboardInterrupt
        return forward(self, frames, labels, carried)

    monkeypatch.setattr(PolicyWithLoss, "forward", counted)
    assert run.main([*arguments, "--out", str(tmp_path / "out"), "--state-dir", str(tmp_path / "w2")]) == 130
    assert not (tmp_path / "out").exists(), "half a training is no checkpoint"
    calls, last = 0, whole.step
    assert run.main([*arguments, "--out", str(tmp_path / "out"), "--state-dir", str(tmp_path / "w2"), "--resume"]) == 0
    assert calls == whole.step * 2 // 3, "the first epoch is not trained again"
    resumed = Checkpoint.load(tmp_path / "out" / MODEL)
    assert resumed.step == whole.step
    want = restore(whole, find_spec(MODEL)).state_dict()
    for name, tensor in restore(resumed, find_spec(MODEL)).state_dict().items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-6)


def test_the_step_of_a_checkpoint_is_that_of_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Worsening(PolicyWithLoss):
        """Judged the worse the longer it trains, so that the first epoch is the best."""

        judged = 0

        def forward(self, frames: Tensor, labels: Tensor, carried: Tensor) -> dict[str, Tensor]:
            if self.training:
                return super().forward(frames, labels, carried)
            self.judged += 1
            return {"loss": torch.tensor(float(self.judged))}

    monkeypatch.setattr(recipe_module, "PolicyWithLoss", Worsening)
    assert (
        run.main([MODEL, *sets(epochs=3, patience=2), "--out", str(tmp_path), "--state-dir", str(tmp_path / "w")]) == 0
    )
    states = sorted(int(path.name.partition("-")[2]) for path in (tmp_path / "w" / MODEL).glob("checkpoint-*"))
    assert Checkpoint.load(tmp_path / MODEL).step == states[0] < states[-1]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["policy_rnn"], "expected a known model, found 'policy_rnn'; did you mean"),
        ([MODEL, "--preset", "huge"], "expected a preset of tiny, full; found 'huge'"),
        ([MODEL, "--set", "speed=9"], f"expected a known setting of {MODEL}, found 'speed'"),
        ([MODEL, "--speed", "9"], f"expected a known setting of {MODEL}, found 'speed'"),
        ([MODEL, "--set", "lr"], "expected NAME=VALUE, found 'lr'"),
        ([MODEL, "--set", "lr=fast"], "--set lr: expected float such as .*, found 'fast'"),
        ([MODEL, "--set", "lr=nan"], "--set lr: expected float such as .*, found 'nan'"),
        ([MODEL, "--set", "batch=1.5"], "--set batch: expected int such as 16, found '1.5'"),
        ([MODEL, "--set", "batch=0"], "--set batch: expected a number above 0, found 0"),
        ([MODEL, "--set", "epochs=-1"], "--set epochs: expected a number above 0, found -1"),
        ([MODEL, "--set", "seed=-1"], "--set seed: expected 0 or more, found -1"),
        ([MODEL, "--set", "half_table=maybe"], "--set half_table: expected bool such as False, found 'maybe'"),
        ([MODEL, "--data", "/nowhere/replays"], "expected a folder of .slp replays at /nowhere/replays, found nothing"),
        ([MODEL, "--resume"], "--resume: expected states of an earlier run in --state-dir, found none"),
        ([MODEL, "--resume", "--state-dir", "/nowhere"], "--resume: expected states .* found none in /nowhere"),
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
        ("policy_lstm", "backbone=gru", "found 'backbone'"),
        ("policy_attention", "dropout=1", "expected a dropout in"),
        ("policy_gru", "window=0", "expected a window and a stride of 1 or more"),
        ("policy_gru", "windows=slow", "expected mode lazy, eager or auto, found 'slow'"),
        ("policy_gru", "valid_share=0", "valid_share: expected games to evaluate on, found none"),
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
    recipe = PolicyRecipe(*configure(spec, "tiny", {"games": "10", "frames": "1000"}), None)
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
    assert checkpoint.sample_inputs()["frames"].shape[0] >= 1
