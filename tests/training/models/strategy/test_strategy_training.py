"""Training learns what there is to learn, beats its baselines, and its settings do what they say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from runtimes.cache.store import Store
from training.checkpoint import Checkpoint
from training.frozen_store import fill
from training.models.strategy.module import typed_edges
from training.models.strategy.pruning import Pruning
from training.models.strategy.recipe import INPUTS, StrategyRecipe
from training.run import main as run
from training.settings import configure
from training.spec import find_spec

SPEC = find_spec("strategy")


def recipe_of(data: Path | None = None, **changes: Any) -> StrategyRecipe:
    config, training = configure(SPEC, "tiny", {name: str(value) for name, value in changes.items()})
    return StrategyRecipe(config, training, data)


@pytest.mark.slow
@pytest.mark.parametrize("change", [{}, {"emotion": "hard"}, {"rgat": "dense"}, {"prune": "0.1"}])
def test_what_can_be_learned_is_learned(change: dict[str, str], tmp_path: Path) -> None:
    arguments = [part for name, value in change.items() for part in (f"--{name}", value)]
    assert run(["strategy", "--out", str(tmp_path), "--epochs", "15", *arguments]) == 0
    checkpoint = Checkpoint.load(tmp_path / "strategy")
    assert checkpoint.metrics["accuracy"] > 0.8, "nine labels in ten follow from the emotion"


def test_both_forms_of_attention_give_the_same_loss() -> None:
    losses = []
    for form in ("pyg", "dense"):
        recipe = recipe_of(rgat=form, dialogues=10)
        torch.manual_seed(0)
        with_loss = recipe.module_with_loss(SPEC.interface.build(recipe.config)).eval()
        losses.append(with_loss(**recipe.datasets(1)[0].__getitems__(range(8)))["loss"])
    torch.testing.assert_close(losses[0], losses[1])


def test_every_parameter_in_the_optimiser_is_used() -> None:
    recipe = recipe_of(dialogues=10)
    with_loss = recipe.module_with_loss(SPEC.interface.build(recipe.config)).train()
    with_loss(**recipe.datasets(1)[0].__getitems__(range(32)))["loss"].backward()
    trained = {name: p for name, p in with_loss.named_parameters() if p.requires_grad}
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []


def test_an_epoch_shows_every_sample_once_and_each_in_another_order() -> None:
    dataset = recipe_of(dialogues=10).datasets(1)[0]
    orders = []
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        orders.append(dataset.__getitems__(range(len(dataset)))["rows"].tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(len(dataset)))
    assert orders[0] != orders[1]


def test_pruning_begins_with_the_second_visit_and_cuts_only_weak_edges_to_the_dummy() -> None:
    recipe = recipe_of(dialogues=10)
    graph = SPEC.interface.build(recipe.config).dialogue
    batch = recipe.datasets(1)[1].__getitems__(range(4))
    inputs = tuple(batch[name] for name in INPUTS)
    typed = typed_edges(batch["kinds"], batch["relations"])
    strongest = graph(*inputs)[2].mean(1).max().item()
    pruning = Pruning(graph, threshold=strongest, samples=4)
    assert torch.equal(pruning.cut(typed, torch.arange(4), inputs), typed)
    cut = pruning.cut(typed, torch.arange(4), inputs)
    assert torch.equal(cut[:, 1:], typed[:, 1:])
    kept = (cut[:, 0, 1:] >= 0).sum()
    assert 1 <= kept < (typed[:, 0, 1:] >= 0).sum()
    assert pruning.share > 0


def test_class_weights_have_mean_one_and_favour_the_rare() -> None:
    recipe = recipe_of(class_weights=1.0, dialogues=10)
    weights, counts = recipe._class_weights(), torch.bincount(recipe.tables[0]["labels"], minlength=8)
    assert weights.mean().item() == pytest.approx(1)
    assert weights[counts.argmin()] == weights.max()


def test_a_parser_gives_edges_to_dialogues_that_have_none(tmp_path: Path) -> None:
    turns = [{"speaker": "seeker", "content": "I am sad."}, {"speaker": "supporter", "content": "Why?", "strategy": 2}]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"dialog": turns * 2}, {"dialog": turns}]))
    recipe = recipe_of(path, parser="sddp", history=5)
    store = tmp_path / "store"
    with Store(store) as opened:
        for reading in recipe.frozen_inferences():
            fill(opened, reading)
    parsed = recipe_of(path, parser="sddp", history=5, store=store).tables[0]
    plain = recipe_of(path, history=5).tables[0]
    assert (plain["relations"] == -1).all()
    turns_but_first = (parsed["kinds"] > 0).sum() - len(parsed["kinds"])
    assert (parsed["relations"] >= 0).sum() == turns_but_first


@pytest.mark.slow
def test_real_dialogues_are_predicted_better_than_by_the_majority(data: Path, tmp_path: Path) -> None:
    path = data / "dialogue" / "esconv_valid.jsonl"
    small = tmp_path / "small.jsonl"
    small.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:600]), encoding="utf-8")
    assert run(["strategy", "--data", str(small), "--out", str(tmp_path), "--history", "5", "--epochs", "4"]) == 0
    found = Checkpoint.load(tmp_path / "strategy").metrics
    recipe = recipe_of(small, history=5)
    labels = recipe.tables[1]["labels"]
    assert found["macro_f1"] > recipe._measure(torch.full_like(labels, int(labels.mode().values)))["macro_f1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "daily"], "expected labels of esconv, annomi; found 'daily'"),
        (["--history", "0"], "expected a history of 1 to max_turns = 16, found 0"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["strategy", "--out", str(tmp_path), *arguments]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: {message}"]
