"""Dialogues: three formats become the same samples, dialogues are not torn apart, and errors name the place."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.pipelines.strategy.dialogue import (
    EMOTIONS,
    EXAMPLE,
    OTHER,
    RELATIONS,
    ROOT,
    SEEKER,
    STRATEGIES,
    graph_tensors,
    read_dialogue,
)
from training.models.strategy.data import read_samples, split_by_dialogue, synthetic_samples, train_and_valid
from training.models.strategy.metrics import confusion, measure

GOLDEN = [
    [0, 0, 23, 49, 30, 12, 3, 15], [0, 0, 13, 71, 28, 6, 5, 19], [3, 0, 61, 96, 58, 56, 5, 25],
    [1, 1, 31, 91, 69, 20, 6, 28], [0, 0, 11, 109, 118, 6, 9, 62], [0, 0, 22, 38, 12, 21, 0, 6],
    [0, 2, 11, 39, 29, 4, 5, 32], [1, 0, 14, 78, 63, 10, 7, 126],
]  # fmt: skip
ENGLISH = [
    {
        "emotion_type": "anxiety",
        "dialog": [
            {"speaker": "seeker", "annotation": {}, "content": "Hello\n"},
            {"speaker": "supporter", "annotation": {"strategy": "Question"}, "content": "What happened?"},
            {"speaker": "seeker", "annotation": {"feedback": "4"}, "content": "I lost my job."},
            {"speaker": "supporter", "annotation": {"strategy": "Others"}, "content": "I see."},
        ],
    }
]
TELUGU = [
    {
        "సంభాషణ": [
            {"వక్త": "సహాయార్థి", "విషయం": "నమస్కారం"},
            {"వక్త": "సహాయకుడు", "విషయం": "ఏమైంది?", "వ్యాఖ్యానం": {"వ్యూహం": "Question"}},
            {"వక్త": "సహాయార్థి", "విషయం": "నా ఉద్యోగం పోయింది."},
            {"వక్త": "సహాయకుడు", "విషయం": "అర్థమైంది.", "వ్యూహం": "Others"},
        ]
    }
]


def written(tmp_path: Path, value: Any, name: str = "data.json") -> Path:
    path = tmp_path / name
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def test_the_golden_matrix_gives_the_published_metrics() -> None:
    found = measure(np.array(GOLDEN))
    assert [round(found[name], 5) for name in ("accuracy", "macro_f1", "weighted_f1", "preference_bias")] == [
        0.25422, 0.18142, 0.23014, 0.84516,
    ]  # fmt: skip


def test_metrics_agree_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 8, 500), rng.integers(0, 7, 500)  # class 7 is never predicted
    matrix = confusion(true, predicted, 8)
    np.testing.assert_array_equal(matrix, metrics.confusion_matrix(true, predicted, labels=range(8)))
    found = measure(matrix)
    for average in ("macro", "weighted"):
        want = metrics.f1_score(true, predicted, labels=range(8), average=average, zero_division=0)
        assert found[f"{average}_f1"] == pytest.approx(want)


def test_a_model_with_one_constant_prediction_has_a_finite_bias() -> None:
    always = confusion([0, 1, 2, 2], [2, 2, 2, 2], 3)
    assert measure(always)["preference_bias"] == pytest.approx(np.std([0, 0, 3]))


@pytest.mark.parametrize("form", [ENGLISH, TELUGU])
def test_a_sample_is_everything_before_a_supporters_turn(form: Any, tmp_path: Path) -> None:
    samples = read_samples(written(tmp_path, form), "esconv", 5)
    assert [sample.label for sample in samples] == [2, 7]
    assert [len(sample.dialogue.turns) for sample in samples] == [2, 4]
    last = samples[1].dialogue.turns[-1]
    assert last.speaker == "seeker"  # the seeker's last reply is part of the input
    assert last.text in ("I lost my job.", "నా ఉద్యోగం పోయింది.")
    assert [turn.strategy for turn in samples[1].dialogue.turns] == [None, None, 2, None]


def test_the_newest_turns_are_kept_with_their_edges() -> None:
    turns = [{"speaker": "seeker", "text": str(i)} for i in range(4)]
    edges = [[0, 1, ROOT], [1, 2, 3], [1, 3, 4], [3, 4, 5], [4, 1, 6], [3, 2, 7]]
    dialogue = read_dialogue({"turns": turns, "edges": edges}, STRATEGIES["esconv"], "here").newest(2)
    assert [turn.text for turn in dialogue.turns] == ["2", "3"]
    assert dialogue.edges == ((1, 2, 5),)


def test_the_graph_of_the_example() -> None:
    tensors = graph_tensors([read_dialogue(EXAMPLE, STRATEGIES["esconv"], "here")], 8, longest=3)
    assert tensors["kinds"].tolist() == [[OTHER, SEEKER, 0]]
    assert tensors["strategies"].tolist() == [[2, 8, 8]]
    assert tensors["relations"][0].tolist() == [[-1, -1, -1], [1, -1, -1], [-1, -1, -1]]
    assert len(RELATIONS) == 19


def test_no_dialogue_is_on_both_sides_of_the_split() -> None:
    samples = synthetic_samples(0, 40, "esconv")
    train, valid = split_by_dialogue(samples, 0.2, 3)
    assert len(train) + len(valid) == len(samples)
    assert not {sample.group for sample in train} & {sample.group for sample in valid}
    assert len({sample.group for sample in valid}) == 8


def test_the_recorded_data_is_read_whole(data: Path) -> None:
    folder = data / "dialogue"
    samples = read_samples(folder / "esconv_valid.jsonl", "esconv", 5)
    assert len(samples) == 2722
    assert 150 < len({sample.group for sample in samples}) < 250
    for sample in samples:
        assert sample.dialogue.emotion_logits is not None
        assert sample.dialogue.emotion_logits.shape == (len(sample.dialogue.turns), len(EMOTIONS))
    train, valid = train_and_valid(folder, "annomi", 5, 0.15, 0)
    assert (len(train), len(valid)) == (3450, 514)


def test_a_row_of_the_recorded_data_is_a_valid_request(data: Path) -> None:
    with (data / "dialogue" / "esconv_valid.jsonl").open(encoding="utf-8") as lines:
        row = json.loads(next(lines))
    row.pop("label")
    assert read_dialogue(row, STRATEGIES["esconv"], "here").turns[0].text == "<START>"


TURN = {"speaker": "seeker", "text": "hello"}


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        ({"turns": []}, "turns; found \\[\\]"),
        ({}, "turns"),
        ([], "object"),
        ({"turns": [TURN] * 10_000}, "list of 10000"),
        ({"turns": [{**TURN, "speaker": "doctor"}]}, "seeker, supporter"),
        ({"turns": [{**TURN, "speaker": None}]}, "speaker"),
        ({"turns": [{"speaker": "seeker"}]}, "text"),
        ({"turns": [{**TURN, "text": 3}]}, "characters"),
        ({"turns": [{**TURN, "text": "\ud800"}]}, "surrogate"),
        ({"turns": [{**TURN, "text": "x" * 30_000}]}, "30000 characters"),
        ({"turns": [{**TURN, "mood": 3}]}, "mood"),
        ({"turns": [{**TURN, "strategy": "Hypnosis"}]}, "Self-disclosure"),
        ({"turns": [{**TURN, "strategy": 8}]}, r"0\.\.7"),
        ({"turns": [{**TURN, "strategy": True}]}, r"0\.\.7"),
        ({"turns": [TURN], "edges": [[0, 2, 16]]}, r"1\.\.1"),
        ({"turns": [TURN], "edges": [[1, 1, 0]]}, r"\[1, 1, 0\]"),
        ({"turns": [TURN, TURN], "edges": [[1, 2, 17]]}, r"0\.\.15"),
        ({"turns": [TURN, TURN], "edges": [[1, 2, 0], [1, 2, 1]]}, "one edge"),
        ({"turns": [TURN], "edges": [[0, 1]]}, "whole numbers"),
        ({"turns": [TURN], "edges": 3}, "list"),
        ({"turns": [TURN], "emotion_logits": [[0.0] * 7] * 2}, "1 rows"),
        ({"turns": [TURN], "emotion_logits": [[0.0] * 6]}, "7 numbers"),
        ({"turns": [TURN], "emotion_logits": [[float("nan")] * 7]}, "numbers"),
        ({"turns": [TURN], "emotion_probs": [[1.5] * 7]}, r"0\.\."),
    ],
)
def test_a_wrong_request_is_refused_in_one_line(request_: Any, named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        read_dialogue(request_, STRATEGIES["esconv"], "request 0")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("request 0")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("a.jsonl", b'{"turns": [\xff]}', "UTF-8"),
        ("a.json", b'[{"dialog": "\xff"}]', "UTF-8"),
        ("a.jsonl", b"{", r"a\.jsonl:1"),
        ("a.jsonl", b'{"turns": []}\n', "label"),
        ("a.jsonl", b"", "none"),
        ("a.json", b"{}", "list of dialogues"),
        ("a.json", b'[{"dialog": []}]', "empty dialogue"),
        ("a.json", b'[{"dialog": [{"speaker": "doctor", "content": "x"}]}]', "doctor"),
        ("a.json", b'[{"dialog": [{"content": "x"}]}]', "speaker"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(name: str, content: bytes, named: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=named) as caught:
        read_samples(tmp_path / name, "esconv", 5)
    assert "\n" not in str(caught.value)
