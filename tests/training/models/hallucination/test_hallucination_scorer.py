"""The scorer: its numbers against sklearn's and the published ones, what it refuses, and what of it is kept."""

import cProfile
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from runtimes.errors import InputError
from training import evaluate, run
from training.checkpoint import Checkpoint, restore
from training.models.hallucination import fitting
from training.models.hallucination.metrics import auc, best_threshold, intervals, mutual_information
from training.models.hallucination.recipe import LEAST, fitted_of, synthetic_units
from training.models.hallucination.settings import TINY
from training.models.hallucination.training import SETTINGS as TRAINING
from training.models.hallucination.units import Units, read_log
from training.spec import find_spec

LOG = "hallucination/llama2_7b_chunk_scores_b.json"
SETTINGS = {**TRAINING, "seed": 0}


@pytest.fixture
def units() -> Units:
    return synthetic_units(TINY, seed=3, count=80)


def write_log(path: Path, units: Units) -> Path:
    """The units as a score log in the public format."""
    rows = []
    for response, source in enumerate(units.sources):
        scores = [
            {
                "prompt_attention_score": {str(head): units.ecs[i, h] for h, head in enumerate(units.heads)},
                "parameter_knowledge_scores": {f"layer_{x}": units.pks[i, k] for k, x in enumerate(units.layers)},
                "r_span": [100, 100 + int(units.lengths[i])],
                "hallucination_label": int(units.labels[i]),
            }
            for i in np.flatnonzero(units.responses == response)
        ]
        rows.append({"id": str(response), "source_id": source, "scores": scores})
    path.write_text(json.dumps(rows))
    return path


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert evaluate.main(["hallucination", *arguments, "--json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


# The published numbers -----------------------------------------------------------------------------------------------


def test_the_published_settings_give_the_published_numbers(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = evaluated(capsys, "--scores", str(data / LOG))
    assert printed["metrics"]["auc"] == pytest.approx(0.6885469342604298, abs=1e-15)
    assert printed["metrics"]["pcc"] == pytest.approx(0.32314327508344176, abs=1e-12)
    assert printed["baselines"].keys() == {"held_out", "chunk_length", "length_for_pks"}
    assert printed["metrics"]["auc_low"] < printed["metrics"]["auc"] < printed["metrics"]["auc_high"]


def test_chosen_on_folds_without_its_noise_the_log_gives_more(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = evaluated(capsys, "--scores", str(data / LOG))
    assert printed["baselines"]["held_out"]["auc"] > 0.70, "on sources that nothing was chosen by"
    units = read_log(data / LOG)
    (member,) = fitting.fit(units, SETTINGS).members
    assert member.m == 0, "the log's PKS is floating-point noise, and the folds say so"


def test_the_heads_of_the_published_settings_are_those_of_the_log(data: Path) -> None:
    units = read_log(data / LOG)
    assert fitting.rank(units, "auc")[0][:3] == [31, 26, 28]


def test_no_error_of_the_features_is_magnified_more_than_is_said(units: Units) -> None:
    scorer = fitting.fit_published(units, SETTINGS)
    (member,) = scorer.members
    worst = replace(units, ecs=units.ecs - 1e-6 * np.sign(member.alpha), pks=units.pks + 1e-6 * np.sign(member.m))
    moved = np.abs(scorer.score(worst) - scorer.score(units)).max()
    assert moved == pytest.approx(1e-6 * scorer.magnification, rel=1e-6)


def test_features_that_hardly_differ_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    units = synthetic_units(TINY, seed=3, count=80)
    for name, scale in (("alike", 1e-4), ("apart", 1.0)):
        log = write_log(tmp_path / f"{name}.json", replace(units, ecs=units.ecs * scale, pks=units.pks * scale))
        assert run.main(["hallucination_scorer", "--scores", str(log), "--out", str(tmp_path / name)]) == 0
        assert ("scores magnify their rounding" in capsys.readouterr().err) == (name == "alike")


def test_the_work_of_scoring_does_not_grow_with_the_number_of_chunks(data: Path) -> None:
    """1,159 chunks are scored by as many calls of Python functions as 100: by whole tables, never chunk by chunk."""
    units = read_log(data / LOG)
    few = units.take(np.arange(len(units.sources)) < 50)
    scorer = fitting.fit_published(units, SETTINGS)
    calls = [calls_of(lambda part=part: scorer.judge(part)) for part in (few, units)]
    assert len(units.labels) == 1159
    assert calls[0] == calls[1]


def calls_of(act: Callable[[], Any]) -> int:
    """How many functions `act` calls, those of NumPy written in C included."""
    profile = cProfile.Profile()
    profile.runcall(act)
    return sum(entry.callcount for entry in profile.getstats())


def test_what_is_called_is_what_would_be_served() -> None:
    """A served score ends at 0 and at 1; a threshold of 0 then calls everything, on held-out answers as well."""
    units = synthetic_units(TINY, 0, 40)
    scorer = replace(fitting.fit_published(units, SETTINGS), threshold=0.0)
    assert scorer.calls(np.array([-0.3, 0.0, 1.4])).all()
    assert replace(scorer, threshold=1.0).calls(np.array([0.9, 1.4])).tolist() == [False, True]


# Its arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_mutual_information_are_those_of_sklearn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    scores = np.round(labels + rng.normal(size=200), 1)  # with ties
    assert auc(labels, scores) == pytest.approx(sklearn_metrics.roc_auc_score(labels, scores), abs=1e-12)
    distinct = labels + rng.normal(size=200)
    bins = np.digitize(distinct, np.quantile(distinct, np.linspace(0, 1, 11)[1:-1]))
    want = sklearn_metrics.mutual_info_score(labels, bins)
    assert mutual_information(labels, distinct) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_has_the_best_f1_of_the_precision_recall_curve(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(0, 2, 60), np.round(rng.random(60), 1)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(labels, scores)
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    found = sklearn_metrics.f1_score(labels, scores >= best_threshold(labels, scores))
    assert found == pytest.approx(best)


def test_the_score_is_the_published_formula(units: Units) -> None:
    scorer = fitting.fit_published(units, SETTINGS)
    (member,) = scorer.members
    ecs = units.ecs[:, [units.heads.index(head) for head in member.heads]].sum(1)
    pks = units.pks[:, [units.layers.index(layer) for layer in member.layers]].sum(1)
    scale = [(values - values.min()) / (values.max() - values.min()) for values in (pks, ecs)]
    chunks = scale[0] - 0.6 * scale[1]
    responses = np.array([chunks[units.responses == i].mean() for i in range(len(units.sources))])
    want = (responses - responses.min()) / (responses.max() - responses.min())
    np.testing.assert_allclose(scorer.judge(units), want, atol=1e-12)
    assert (len(member.heads), len(member.layers)) == (3, 4)


@pytest.mark.parametrize("select", ["auc", "mi"])
def test_heads_and_layers_that_tell_nothing_come_last(units: Units, select: str) -> None:
    rng = np.random.default_rng(0)
    ecs, pks = units.ecs.copy(), units.pks.copy()
    ecs[:, 5], pks[:, 2] = rng.random(len(ecs)), rng.random(len(pks))
    ecs[:, 7] = 1 - units.labels + 0.01 * rng.random(len(ecs))
    ecs[:, 9] = units.labels  # tells all, and points the wrong way
    heads, _ = fitting.rank(replace(units, ecs=ecs, pks=pks), select)
    assert heads[0] == 7
    assert heads[-1] == 9


def test_no_source_is_on_both_sides_of_a_fold(units: Units) -> None:
    shared = replace(units, sources=tuple(str(i // 3) for i in range(len(units.sources))))
    parts = fitting.folds(shared, 5, 0)
    assert len(parts) == 5
    for train in parts:
        names = np.array(shared.sources)
        assert not set(names[train]) & set(names[~train])
    assert sum((~train).sum() for train in parts) == len(units.sources)


def test_held_out_scores_know_nothing_of_their_own_labels() -> None:
    areas = []
    for seed in range(6):
        units = synthetic_units(TINY, seed=seed, count=200)
        rng = np.random.default_rng(seed)
        noise = replace(units, ecs=rng.random(units.ecs.shape), pks=rng.random(units.pks.shape))
        areas.append(auc(noise.response_labels, fitting.held_out(noise, SETTINGS)[0]))
    assert abs(np.mean(areas) - 0.5) < 0.05
    memory = replace(units, ecs=1.0 - np.repeat(units.labels[:, None], len(units.heads), 1))
    assert auc(memory.response_labels, fitting.held_out(memory, SETTINGS)[0]) > 0.9, "and much of what can be known"


def test_an_interval_holds_the_value_and_narrows_with_more_responses() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for count in (50, 800):
        labels = rng.integers(0, 2, count)
        scores = labels + 2 * rng.normal(size=count)
        found = intervals(labels, scores)
        assert found["auc_low"] < auc(labels, scores) < found["auc_high"]
        widths.append(found["auc_high"] - found["auc_low"])
    assert widths[1] < widths[0] / 2


def test_the_module_scores_as_the_table_does(tmp_path: Path) -> None:
    import torch

    assert run.main(["hallucination_scorer", "--out", str(tmp_path), "--ensemble", "3"]) == 0
    checkpoint = Checkpoint.load(tmp_path / "hallucination_scorer")
    module = restore(checkpoint, find_spec("hallucination_scorer"))
    units = synthetic_units(TINY, seed=9, count=20)
    fitted = fitted_of(module.scorer, checkpoint.config["threshold"])
    assert len(fitted.members) == 3
    own = units.columns(module.scorer.heads, module.scorer.layers)
    for i in range(20):
        rows = units.responses == i
        given = (torch.from_numpy(values[rows][None]) for values in (own.ecs, own.pks))
        scores, response = module(*(values.float() for values in given), torch.from_numpy(own.lengths[rows][None]))
        np.testing.assert_allclose(scores[0].numpy(), fitted.score(units)[rows], atol=1e-4)
        assert float(response[0]) == pytest.approx(min(1, max(0, fitted.judge(units)[i])), abs=1e-4)


def test_a_checkpoint_is_a_few_kilobytes_and_says_what_training_said(
    tmp_path: Path, units: Units, capsys: pytest.CaptureFixture[str]
) -> None:
    log = str(write_log(tmp_path / "log.json", units))
    assert run.main(["hallucination_scorer", "--scores", log, "--out", str(tmp_path)]) == 0
    checkpoint = Checkpoint.load(tmp_path / "hallucination_scorer")
    assert (checkpoint.folder / "weights.safetensors").stat().st_size < 4096
    capsys.readouterr()
    arguments = ["hallucination_scorer", "--checkpoint", str(checkpoint.folder), "--scores", log, "--json"]
    assert evaluate.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == pytest.approx(dict(checkpoint.metrics), rel=1e-3)
    assert evaluate.main([*arguments, "--threshold", "2"]) == 0
    never = json.loads(capsys.readouterr().out)["metrics"]
    assert (never["recall"], never["auc"]) == (0, printed["metrics"]["auc"]), "a setting by hand counts here as well"
    assert evaluate.main([*arguments, "--heads", "0.0 2.0 4.0 6.0 8.0"]) == 1
    assert "weights.safetensors: 1 parameters do not fit, first 'scorer.uses_head'" in capsys.readouterr().err


# What is refused -----------------------------------------------------------------------------------------------------


def one_class(rows: Any) -> None:
    for row in rows:
        for score in row["scores"]:
            score["hallucination_label"] = 0


def a_nan(rows: Any) -> None:
    rows[4]["scores"][0]["prompt_attention_score"]["(1, 2)"] = float("nan")


def no_label(rows: Any) -> None:
    del rows[4]["scores"][0]["hallucination_label"]


def another_head(rows: Any) -> None:
    scores = rows[4]["scores"][0]["prompt_attention_score"]
    scores["(9, 9)"] = scores.pop("(1, 2)")


def no_scores(rows: Any) -> None:
    rows[:] = [{"id": "1", "response": "text"}]


def no_layers(rows: Any) -> None:
    rows[0]["scores"][0]["parameter_knowledge_scores"] = {}


def scores_that_are_no_list(rows: Any) -> None:
    rows[4]["scores"] = 5


def a_backward_span(rows: Any) -> None:
    rows[4]["scores"][0]["r_span"] = [9, 3]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (one_class, "AUC is undefined: expected hallucinated and faithful .*found .* with label 0 only"),
        (a_nan, "response 4: expected finite numbers in 'prompt_attention_score'"),
        (no_label, "response 4: expected a hallucination_label of 0 or 1, found None"),
        (another_head, "response 4: expected 'prompt_attention_score' as in the first response"),
        (no_scores, "expected responses with scores, found none"),
        (no_layers, "expected scores with 'parameter_knowledge_scores'"),
        (scores_that_are_no_list, "response 4: expected a list of scores, found 5"),
        (a_backward_span, r"response 4: expected r_span as \[first, last\] token, found \[9, 3\]"),
    ],
)
def test_a_wrong_log_is_refused_in_one_line(
    spoil: Callable[[Any], None], message: str, tmp_path: Path, units: Units, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_log(tmp_path / "log.json", units)
    rows = json.loads(path.read_text())
    spoil(rows)
    path.write_text(json.dumps(rows))
    assert evaluate.main(["hallucination", "--scores", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)


def test_a_log_of_another_model_is_refused(tmp_path: Path, units: Units, capsys: pytest.CaptureFixture[str]) -> None:
    other = replace(units, heads=tuple((layer + 20, head) for layer, head in units.heads))
    log = str(write_log(tmp_path / "other.json", other))
    assert run.main(["hallucination", "--scores", log, "--out", str(tmp_path)]) == 2
    assert "they come from another model" in capsys.readouterr().err.splitlines()[-1]
    assert run.main(["hallucination_scorer", "--out", str(tmp_path)]) == 0
    checkpoint = str(tmp_path / "hallucination_scorer")
    assert evaluate.main(["hallucination_scorer", "--checkpoint", checkpoint, "--scores", log]) == 2
    assert "they come from another model" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "/nowhere.json"], "expected this file, found none"),
        (["--fit", "magic"], "expected grid or published, found 'magic'"),
        (["--select", "luck"], "expected auc or mi, found 'luck'"),
        (["--valid_share", "1"], "expected 2 or more sources and a share in 0..1"),
        *((["--" + name, "0"], f"--set {name}: expected {least} or more") for name, least in LEAST.items()),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["hallucination_scorer", "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_needs_a_checkpoint_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["policy_gru"]) == 2
    assert capsys.readouterr().err.splitlines() == ["error: expected --checkpoint DIR, found none"]


def test_features_with_a_nan_are_refused(units: Units) -> None:
    ecs = units.ecs.copy()
    ecs[7, 3] = np.nan
    with pytest.raises(InputError, match=r"expected finite features, found nan in ECS of unit 7, \(0, 3\)"):
        replace(units, ecs=ecs)
