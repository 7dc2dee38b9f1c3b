"""The sample files are read back by each package's own reader, as the data they were made from."""

from pathlib import Path

import numpy as np
import pytest

from training import sample_data
from training.models.hallucination.data import read_ragtruth, synthetic_examples
from training.models.hnet.data import read_corpora, synthetic_corpora
from training.models.statements.data import split_by_paper
from training.models.statements.data import train_and_valid as read_statements
from training.models.statements.synthetic import synthetic_papers
from training.models.strategy.data import read_samples, synthetic_samples


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    assert sample_data.main(["strategy", "hallucination", "statements", "hnet", "--out", str(folder)]) == 0
    return folder


def test_dialogues_are_read_back_with_their_groups(written: Path) -> None:
    samples, made = (
        read_samples(written / "strategy" / "esconv.jsonl", "esconv", 5),
        synthetic_samples(0, 150, "esconv"),
    )
    assert [(each.dialogue.turns, each.dialogue.edges, each.label) for each in samples] == [
        (each.dialogue.turns, each.dialogue.edges, each.label) for each in made
    ]
    assert len({each.group for each in samples}) == len({each.group for each in made}) == 150


def test_answers_are_read_back_with_their_spans_and_labels(written: Path) -> None:
    assert read_ragtruth(written / "hallucination", "") == synthetic_examples(0, 120)


def test_papers_are_read_back_in_both_parts(written: Path) -> None:
    train, valid = read_statements(written / "statements", 0.2, 0)
    assert (train, valid) == split_by_paper(synthetic_papers(0, 200), 0.2, 0)


def test_texts_are_read_back_in_both_parts(written: Path) -> None:
    for read, made in zip(read_corpora(written / "hnet", "document")[:2], synthetic_corpora(0, 400), strict=True):
        np.testing.assert_array_equal(read.text, made.text)
        np.testing.assert_array_equal(read.offsets, made.offsets)


def test_a_seed_changes_the_files_and_the_same_seed_does_not(tmp_path: Path) -> None:
    texts = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert sample_data.main(["statements", "--out", str(tmp_path / name), "--seed", seed]) == 0
        texts.append((tmp_path / name / "statements" / "train.jsonl").read_bytes())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(("name", "message"), [("policy", "writes sample data"), ("strateg", "mean 'strategy'")])
def test_a_package_without_sample_data_and_an_unknown_one_are_refused(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample_data.main([name]) == 2
    assert message in capsys.readouterr().err
