"""A collection: rows stay with their statements, a killed run continues, and a damaged one is an error of one line."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from runtimes.errors import ArtifactError, InputError, SlipwayError
from runtimes.search import writer
from runtimes.search.collection import Collection, Entry, Info, Lines
from runtimes.search.writer import SHARDS, Writer

ROWS, WIDTH = 10, 6
INFO = Info(
    rows=ROWS, width=WIDTH, dtype="float32", model="m" * 64, base={"source": "tiny", "sha256": "b" * 64},
    pooling="last", max_tokens=256, size="toy", data="d" * 64,
)  # fmt: skip
ENTRIES = [
    Entry(paper=i // 3, arxiv_id=f"math/{i // 3}", title="Räume\u2028", type="lemma", text=f"$x < {i}$\nand")
    for i in range(ROWS)
]


def unit_rows(rows: int = ROWS, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_collection(folder: Path, info: Info = INFO) -> np.ndarray:
    vectors = unit_rows()
    writer = Writer.reserve(folder, info, ENTRIES)
    writer.write(0, vectors)
    writer.finish()
    return vectors


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("float16", 1e-3)])
def test_rows_and_entries_come_back_as_they_were(dtype: str, error: float, tmp_path: Path) -> None:
    info = replace(INFO, dtype=dtype)
    vectors = write_collection(tmp_path / "toy", info)
    collection = Collection.open(tmp_path / "toy")
    assert collection.info == info
    assert [collection.entry(row) for row in range(ROWS)] == ENTRIES
    np.testing.assert_allclose(collection.embeddings, vectors, rtol=0, atol=error)
    np.testing.assert_array_equal(
        load_file(tmp_path / "toy/embeddings.safetensors")["embeddings"], collection.embeddings
    )
    assert sorted(os.listdir(tmp_path / "toy")) == ["embeddings.safetensors", "info.json", "metadata.jsonl"]


def test_a_file_that_safetensors_wrote_is_read(tmp_path: Path) -> None:
    write_collection(tmp_path)
    vectors = unit_rows(seed=1)
    save_file({"embeddings": vectors}, tmp_path / "embeddings.safetensors")
    np.testing.assert_array_equal(Collection.open(tmp_path).embeddings, vectors)


def test_shards_may_come_in_any_order_and_only_missing_ones_are_asked_for(tmp_path: Path) -> None:
    vectors = unit_rows()
    writer = Writer.reserve(tmp_path, INFO, ENTRIES)
    assert writer.missing(4) == [(0, 4), (4, 8), (8, 10)]
    writer.write(8, vectors[8:])
    writer.write(4, vectors[4:8])
    again = Writer.reserve(tmp_path, INFO, [])  # the metadata is there already
    assert again.missing(4) == [(0, 4)]
    assert again.missing(3) == [(0, 3), (3, 6)]  # a run with other shards repeats what it must, and no more
    with pytest.raises(ArtifactError, match="found 4 missing, the first is 0"):
        again.finish()
    again.write(0, vectors[:4])
    assert (again.missing(4), again.finished) == ([], False)
    again.finish()
    again.finish()
    writer.finish()
    assert Writer.reserve(tmp_path, INFO, []).missing(1) == []
    np.testing.assert_array_equal(Collection.open(tmp_path).embeddings, vectors)


def write_share(folder: Path, rank: int, world: int) -> None:
    writer = Writer.reserve(folder, INFO, ENTRIES)
    vectors = unit_rows()
    for start, stop in writer.missing(2):
        if start // 2 % world == rank:
            writer.write(start, vectors[start:stop])


def test_processes_reserve_and_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_share, args=(tmp_path / "toy", rank, 3)) for rank in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    Writer.reserve(tmp_path / "toy", INFO, []).finish()
    np.testing.assert_array_equal(Collection.open(tmp_path / "toy").embeddings, unit_rows())


@pytest.mark.parametrize(("place", "name"), [(Writer, "_written"), (writer, "read_json")])
def test_a_worker_that_another_overtakes_finishes_too(
    place: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slower, faster = (Writer.reserve(tmp_path, INFO, ENTRIES) for _ in range(2))
    faster.write(0, unit_rows())
    real = getattr(place, name)

    def overtaken(*arguments: object) -> object:
        monkeypatch.undo()
        faster.finish()
        return real(*arguments)

    monkeypatch.setattr(place, name, overtaken)
    slower.finish()
    np.testing.assert_array_equal(Collection.open(tmp_path).embeddings, unit_rows())


def test_a_killed_run_goes_on_with_what_it_had_recorded(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path\n"
        "from tests.runtimes.search.test_collection import *\n"
        f"writer = Writer.reserve(Path({str(tmp_path)!r}), INFO, ENTRIES)\n"
        "writer.write(0, unit_rows()[:4]); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3], check=False)
    assert killed.returncode == -signal.SIGKILL
    with pytest.raises(ArtifactError, match="not; go on to precompute"):
        Collection.open(tmp_path)
    writer = Writer.reserve(tmp_path, INFO, [])
    assert writer.missing(2) == [(4, 6), (6, 8), (8, 10)]
    writer.write(4, unit_rows()[4:])
    writer.finish()
    np.testing.assert_array_equal(Collection.open(tmp_path).embeddings, unit_rows())


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("change", [{"model": "x" * 64}, {"dtype": "float16"}, {"data": "x" * 64}, {"rows": 9}])
def test_another_runs_folder_is_refused(change: dict[str, object], finished: bool, tmp_path: Path) -> None:
    if finished:
        write_collection(tmp_path)
    else:
        Writer.reserve(tmp_path, INFO, ENTRIES).write(0, unit_rows()[:4])
    with pytest.raises(ArtifactError, match=f"another run: expected {next(iter(change))}"):
        Writer.reserve(tmp_path, replace(INFO, **change), ENTRIES)


def test_a_shard_of_another_run_is_refused(tmp_path: Path) -> None:
    writer = Writer.reserve(tmp_path, INFO, ENTRIES)
    writer.write(0, unit_rows())
    record = tmp_path / SHARDS / "0-10.json"
    record.write_text(record.read_text().replace(INFO.digest, replace(INFO, size="other").digest))
    with pytest.raises(ArtifactError, match="shard of this run"):
        writer.finish()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text("mine\n")
    with pytest.raises(ArtifactError, match="expected an empty folder"):
        Writer.reserve(tmp_path, INFO, ENTRIES)
    assert (tmp_path / "metadata.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(("start", "rows", "says"), [
    (0, unit_rows(2, WIDTH + 1), "expected rows"), (9, unit_rows(2), "at 9"), (-1, unit_rows(1), "at -1"),
    (0, unit_rows(0), "at 0"), (0, unit_rows(2) * 2, "found 2 in row 0"), (1, unit_rows(1) * np.nan, "nan in row 1"),
])  # fmt: skip
def test_wrong_rows_are_not_written(start: int, rows: np.ndarray, says: str, tmp_path: Path) -> None:
    writer = Writer.reserve(tmp_path, INFO, ENTRIES)
    with pytest.raises(SlipwayError, match=says):
        writer.write(start, rows)
    assert writer.missing(ROWS) == [(0, ROWS)]


@pytest.mark.parametrize("entries", [ENTRIES[:9], [*ENTRIES, ENTRIES[0]], [replace(ENTRIES[0], text="\ud800")]])
def test_entries_that_are_not_one_for_each_row_are_refused(entries: list[Entry], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected 10 entries|surrogate"):
        Writer.reserve(tmp_path, INFO, entries)
    assert not (tmp_path / "metadata.jsonl").exists()


def spoil_metadata(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "metadata.jsonl"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def spoil_info(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "info.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def truncate(folder: Path) -> None:
    path = folder / "embeddings.safetensors"
    os.truncate(path, path.stat().st_size - 1)


def empty(folder: Path) -> None:
    os.truncate(folder / "embeddings.safetensors", 0)


def rename_tensor(folder: Path) -> None:
    save_file({"vectors": unit_rows()}, folder / "embeddings.safetensors")


@pytest.mark.parametrize(("spoil", "says"), [
    (spoil_metadata(lambda text: text[: text.index(b"\n") + 1]), "expected 10 lines, one for each row, found 1;"),
    (spoil_metadata(lambda text: text + b"{}"), "found 11;"),
    (spoil_metadata(lambda text: b""), "found 0;"),
    (truncate, "bytes, found"), (empty, "expected a tensor"), (rename_tensor, "expected a tensor"),
    (spoil_info(schema=2), "expected schema 1"), (spoil_info(rows=11), "expected {'dtype'"),
    (spoil_info(rows="10"), "at least 1"), (spoil_info(more=1), "fields: more"), (spoil_info(dtype="int8"), "dtype"),
    (spoil_info(base="tiny"), "base"), (spoil_info(model=None), "model"),
    (lambda folder: (folder / "info.json").unlink(), "expected a collection with info.json"),
    (lambda folder: (folder / "info.json").rename(folder / "embeddings.pt"), "pickle, which is never read"),
    (lambda folder: (folder / "metadata.jsonl").unlink(), "expected lines of JSON"),
])  # fmt: skip
def test_a_damaged_collection_is_refused_in_one_line(spoil: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_collection(tmp_path)
    spoil(tmp_path)
    with pytest.raises(SlipwayError, match=says) as caught:
        Collection.open(tmp_path)
    assert "\n" not in str(caught.value)
    assert "training.precompute" in str(caught.value)


@pytest.mark.parametrize("line", [
    b"not JSON", b"\xff", b"[1]", b"{}", b'{"paper": "0", "arxiv_id": "", "title": "", "type": "", "text": ""}',
    b'{"paper": 0, "arxiv_id": "", "title": "", "type": "", "text": null}',
])  # fmt: skip
def test_a_line_that_is_no_entry_is_named_when_it_is_read(line: bytes, tmp_path: Path) -> None:
    write_collection(tmp_path)
    path = tmp_path / "metadata.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], line, *lines[5:]]))
    collection = Collection.open(tmp_path)
    assert collection.entry(3) == ENTRIES[3]
    with pytest.raises(ArtifactError, match="line 5: "):
        collection.entry(4)


@pytest.mark.parametrize("row", [-1, ROWS])
def test_a_row_that_is_not_there_is_refused(row: int, tmp_path: Path) -> None:
    write_collection(tmp_path)
    with pytest.raises(InputError, match="from 0 to 9"):
        Collection.open(tmp_path).entry(row)


@pytest.mark.parametrize("scan_bytes", [1, 3, 1000])
@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"a\n\nbc\n", b"a\r\nb"])
def test_lines_are_those_that_python_finds(
    text: bytes, scan_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtimes.search.collection.SCAN_BYTES", scan_bytes)
    path = tmp_path / "lines"
    path.write_bytes(text)
    lines = Lines(path)
    with path.open("rb") as stream:
        assert [lines[number] for number in range(len(lines))] == list(stream)


def test_the_rows_begin_on_a_page(tmp_path: Path) -> None:
    write_collection(tmp_path)
    assert Collection.open(tmp_path).embeddings.offset % 4096 == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_papers_are_the_runs_of_equal_numbers(reverse: bool, tmp_path: Path) -> None:
    write_collection(tmp_path)
    if reverse:  # the same lines with their fields in another order
        spoil_metadata(
            lambda text: b"".join(
                json.dumps(dict(reversed(json.loads(line).items()))).encode() + b"\n" for line in text.split(b"\n")[:-1]
            )
        )(tmp_path)
    papers = Collection.open(tmp_path).papers()
    assert [(paper.arxiv_id, paper.start, paper.stop) for paper in papers] == [
        ("math/0", 0, 3), ("math/1", 3, 6), ("math/2", 6, 9), ("math/3", 9, 10),
    ]  # fmt: skip
