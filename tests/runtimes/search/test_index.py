"""The index finds nearly all of what an exact search finds, and is refused beside any other collection."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtimes.artifact import write_manifest
from runtimes.errors import ArtifactError, InputError
from runtimes.search import index
from runtimes.search.collection import Collection, Entry
from runtimes.search.exact import top_k
from runtimes.search.index import INDEX, MANIFEST, Index, build_index, main
from runtimes.search.writer import Writer
from tests.runtimes.search.test_collection import INFO

ROWS, WIDTH = 6000, 32


def clustered_rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    vectors = np.repeat(rng.normal(size=(ROWS // 20, WIDTH)), 20, axis=0) + 0.5 * rng.normal(size=(ROWS, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def write(folder: Path, rows: int = ROWS, model: str = INFO.model) -> Collection:
    info = replace(INFO, rows=rows, width=WIDTH, dtype="float16", model=model)
    writer = Writer.reserve(
        folder, info, (Entry(paper=i, arxiv_id="", title="", type="", text="") for i in range(rows))
    )
    writer.write(0, clustered_rows()[:rows])
    writer.finish()
    return Collection.open(folder)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    collection = write(tmp_path_factory.mktemp("indexed"))
    build_index(collection)
    return collection


def test_nearly_all_of_the_exact_answer_is_found_with_the_exact_scores(indexed: Collection) -> None:
    queries = clustered_rows()[:200]
    exact, found = top_k(indexed.embeddings, queries, 10), Index(indexed).top_k(queries, 10)
    recall = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(exact.rows, found.rows, strict=True)])
    assert recall >= 0.99
    np.testing.assert_array_equal(found.rows[:, 0], np.arange(200))
    both = found.rows == exact.rows
    np.testing.assert_array_equal(found.scores[both], exact.scores[both])
    assert (np.diff(found.scores, axis=1) <= 0).all()


def test_an_answer_longer_than_the_lists_that_were_read_is_whole(tmp_path: Path) -> None:
    collection = write(tmp_path, rows=300)
    build_index(collection)
    query = clustered_rows()[:1]
    assert Index(collection).top_k(query, 1000).rows.tolist() == top_k(collection.embeddings, query, 300).rows.tolist()


def other(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        info = json.loads((folder / "info.json").read_text())
        (folder / "info.json").write_text(json.dumps({**info, name: "f" * 64}))

    return spoil


def other_rows(folder: Path) -> None:
    fields = {"model": INFO.model, "rows": 7, "file": "0" * 64}
    write_manifest(folder / MANIFEST, "slipway.index/1", fields)


def flip(folder: Path) -> None:
    data = bytearray((folder / INDEX).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / INDEX).write_bytes(data)


@pytest.mark.parametrize(("spoil", "says"), [
    (other("model"), "expected model f"), (other("data"), "expected data f"),
    (other_rows, "expected rows 300, found 7"), (flip, "manifest names"),
    (lambda folder: (folder / INDEX).unlink(), "manifest names"),
    (lambda folder: (folder / MANIFEST).write_text("{}"), "expected format"),
])  # fmt: skip
def test_an_index_of_something_else_is_refused(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    build_index(write(tmp_path, rows=300))
    spoil(tmp_path)
    with pytest.raises(ArtifactError, match=says) as caught:
        Index(Collection.open(tmp_path))
    assert "runtimes.search.index" in str(caught.value)


def test_an_index_is_read_whole_only_if_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = write(tmp_path, rows=300)
    build_index(collection)
    read: list[Path] = []
    honest = index.sha256_file

    def counted(path: Path) -> str:
        read.append(path)
        return honest(path)

    monkeypatch.setattr(index, "sha256_file", counted)
    Index(collection)
    assert read == []
    os.utime(tmp_path / INDEX, ns=(1, 1))  # as after a copy
    Index(collection)
    assert len(read) == 1
    Index(collection)
    assert len(read) == 1, "its new time is known now"
    Index(collection, verify=True)
    assert len(read) == 2


def test_a_change_that_hides_behind_size_and_time_is_found_on_demand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_index(write(tmp_path, rows=300))
    assert main([str(tmp_path), "--verify"]) == 0
    assert "unchanged" in capsys.readouterr().out
    time_ns = (tmp_path / INDEX).stat().st_mtime_ns
    flip(tmp_path)
    os.utime(tmp_path / INDEX, ns=(time_ns, time_ns))
    Index(Collection.open(tmp_path))
    assert main([str(tmp_path), "--verify"]) == 1
    assert "found another or none" in capsys.readouterr().err


def test_without_an_index_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=MANIFEST):
        Index(write(tmp_path, rows=10))


def test_the_command_builds_and_builds_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    collection = write(tmp_path, rows=300)
    for _ in range(2):
        assert main([str(tmp_path)]) == 0
        assert "300 rows" in capsys.readouterr().out
        assert Index(collection).top_k(clustered_rows()[:1], 1).rows.tolist() == [[0]]
