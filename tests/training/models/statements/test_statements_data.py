"""Papers are read in both published forms, told apart before they are filtered, and paired without self-pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.errors import InputError
from runtimes.search.papers import SIZES, Statement, read_papers
from training.models.statements.data import draw_pairs, split_by_paper, train_and_valid
from training.models.statements.synthetic import flatten, synthetic_papers

STATEMENTS = [{"type": "lemma", "text": " a "}, {"type": "theorem", "text": "b"}]
NEW = {"arxiv_id": "1", "title": "T", "statements": STATEMENTS}
OLD = {"lemmas": ["c"], "theorems": ["d", "e"]}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_both_published_forms_are_read(tmp_path: Path) -> None:
    new, old = read_papers(written(tmp_path / "x.jsonl", NEW, OLD))
    assert (new.arxiv_id, new.title) == ("1", "T")
    assert new.statements == (Statement(type="lemma", text="a"), Statement(type="theorem", text="b"))
    assert (old.arxiv_id, old.title) == ("", "")
    assert old.statements == (
        Statement(type="lemma", text="c"),
        Statement(type="theorem", text="d"),
        Statement(type="theorem", text="e"),
    )


def test_statements_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    (paper,) = read_papers(written(tmp_path / "x.jsonl", {"lemmas": ["", " \n", "a"]}))
    assert [statement.text for statement in paper.statements] == ["a"]
    assert paper.empty == 2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 99])
def test_reading_stops_after_so_many_statements(count: int, tmp_path: Path) -> None:
    papers = list(read_papers(written(tmp_path / "x.jsonl", NEW, OLD), count))
    assert [s.text for paper in papers for s in paper.statements] == list("abcde")[:count]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "x.jsonl:2: expected a paper as JSON"),
        ("", "x.jsonl:2: expected a paper as JSON"),
        pytest.param("[" * 100_000, "x.jsonl:2: expected a paper as JSON", id="deep"),
        ("[1]", "x.jsonl:2: expected an object"),
        ('{"title": "T"}', "x.jsonl:2: expected an object"),
        ('{"statements": {}}', "x.jsonl:2, statements: expected a list"),
        ('{"statements": [{"text": "a"}]}', "x.jsonl:2, statement 1: expected strings"),
        ('{"statements": [{"text": 5, "type": "a"}]}', "x.jsonl:2, statement 1: expected strings"),
        ('{"lemmas": [null]}', "x.jsonl:2, lemmas 1: expected a string"),
        ('{"lemmas": ["a"], "title": 5}', "x.jsonl:2, title: expected a string"),
        ('{"lemmas": ["\\ud800"]}', "x.jsonl:2: expected Unicode"),
    ],
)
def test_a_line_that_is_no_paper_is_named(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(NEW) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        list(read_papers(path))
    assert str(caught.value).startswith(named)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_or_not_there_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\n")
    for path in (tmp_path / "x.jsonl", tmp_path / "none.jsonl"):
        with pytest.raises(InputError, match=r"expected JSON lines in UTF-8"):
            list(read_papers(path))


def test_a_filter_moves_no_paper_across_the_split() -> None:
    """The public evaluator splits after its filter, and so four in five of its papers had been trained on."""
    papers = synthetic_papers(0, 50)
    train, valid = split_by_paper(papers, 0.2, seed=42)
    assert len(valid) == 10
    assert {p.arxiv_id for p in train} | {p.arxiv_id for p in valid} == {p.arxiv_id for p in papers}
    assert not {p.arxiv_id for p in train} & {p.arxiv_id for p in valid}
    emptied = [type(p)(arxiv_id=p.arxiv_id, title="", statements=p.statements[: i % 3]) for i, p in enumerate(papers)]
    again = split_by_paper(emptied, 0.2, seed=42)
    assert [p.arxiv_id for p in again[1]] == [p.arxiv_id for p in valid]


def test_a_folder_gives_both_parts_and_says_what_it_lacks(tmp_path: Path) -> None:
    written(tmp_path / "a_train.jsonl", NEW)
    with pytest.raises(InputError, match=r"\*valid.jsonl, found 0"):
        train_and_valid(tmp_path, 0.2, 0)
    written(tmp_path / "a_valid.jsonl", OLD, OLD)
    train, valid = train_and_valid(tmp_path, 0.2, 0)
    assert (len(train), len(valid)) == (1, 2)


def test_pairs_are_of_one_paper_never_with_itself_and_leave_nobody_out() -> None:
    papers = np.repeat(np.arange(6), [1, 2, 3, 5, 8, 1])
    for seed in range(50):
        pairs = draw_pairs(papers, np.random.default_rng(seed))
        assert (papers[pairs[:, 0]] == papers[pairs[:, 1]]).all()
        assert (pairs[:, 0] != pairs[:, 1]).all()
        assert len(pairs) == 1 + 2 + 3 + 4
        assert set(pairs.ravel()) == set(range(1, 19))  # the first and the last are alone in their papers


def test_pairs_differ_from_draw_to_draw_and_repeat_with_the_seed() -> None:
    papers = np.repeat(np.arange(20), 4)
    draws = [draw_pairs(papers, np.random.default_rng(seed)).tolist() for seed in (0, 1, 0)]
    assert draws[0] == draws[2] != draws[1]


def test_papers_with_a_single_statement_alone_cannot_be_learned_from() -> None:
    with pytest.raises(InputError, match="two or more statements"):
        draw_pairs(np.arange(5), np.random.default_rng(0))


def test_flattened_statements_know_their_papers() -> None:
    papers = synthetic_papers(1, 5)
    texts, numbers = flatten(papers)
    assert [(papers[n].statements[0].text, n) for n in range(5)] == [
        (texts[int((numbers == n).argmax())], n) for n in range(5)
    ]
    assert len(texts) == len(numbers) == sum(len(paper.statements) for paper in papers)


def test_sizes_are_those_of_the_project() -> None:
    assert list(SIZES.values()) == [100, 1_000, 10_000, 50_000, 500_000]


def test_the_stacks_project_is_read_whole(data: Path) -> None:
    train, valid = train_and_valid(data / "statements", 0.2, 0)
    assert (len(train), len(valid)) == (2021, 253)
    assert sum(len(paper.statements) for paper in valid) == 1462
