"""A text finds its statement from the command line, by the real model; another model's collection is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from runtimes.search.__main__ import main
from runtimes.search.collection import Collection
from runtimes.search.embedder import Embedder
from runtimes.search.index import build_index
from tests.small_collections import MODEL, PAPERS, entries, write_collection

TEXT = PAPERS["\\'Etale maps"][0]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def collection(statements_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("algebra")
    with Embedder(statements_repository) as embedder:
        vectors = np.concatenate([embedder.vectors([entry.text]) for entry in entries()])
        write_collection(folder, vectors=vectors, model=embedder.model)
    build_index(Collection.open(folder))
    return folder


@pytest.mark.parametrize("approximate", [[], ["--approximate"]])
def test_a_text_finds_its_statement(
    approximate: list[str], collection: Path, statements_repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(collection), "--repository", str(statements_repository), "--text", TEXT, "--k", "3", *approximate]
    assert main([*arguments, "--json"]) == 0
    hits = json.loads(capsys.readouterr().out)["hits"]
    assert [hits[0][name] for name in ("row", "paper", "title", "text")] == [3, 1, "\\'Etale maps", TEXT]
    assert hits[0]["score"] == pytest.approx(1, abs=2e-3)
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert "math/1" in lines[0]


@pytest.mark.parametrize(("changes", "says"), [
    ({"--text": "  "}, "blanks"), ({"--repository": "nowhere"}, "model that embeds texts"), ({"--k": "0"}, "k of at"),
])  # fmt: skip
def test_a_wrong_request_is_refused_in_one_line(
    changes: dict[str, str], says: str, collection: Path, statements_repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = {"--text": "a ring", "--repository": str(statements_repository), **changes}
    assert main([str(collection), *(part for pair in flags.items() for part in pair)]) == 2
    printed = capsys.readouterr().err
    assert says in printed
    assert printed.count("\n") == 1


def test_a_collection_of_another_model_is_refused(
    statements_repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_collection(tmp_path)
    assert main([str(tmp_path), "--repository", str(statements_repository), "--text", "a ring"]) == 1
    assert f"found {MODEL[:12]}" in capsys.readouterr().err
