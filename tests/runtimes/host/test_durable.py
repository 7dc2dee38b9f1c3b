"""Syncing reaches the file itself, its folder, and everything below a folder."""

import os
from pathlib import Path

import pytest

from runtimes.host.durable import sync, sync_stream, sync_tree


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What is synced from now on: the size of each file at that moment, and its inode."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: found.append((os.fstat(descriptor).st_size, os.fstat(descriptor).st_ino))
    )
    return found


def test_a_stream_is_flushed_before_it_is_synced(tmp_path: Path, synced: list[tuple[int, int]]) -> None:
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"four")
        sync_stream(stream)
    assert synced == [(4, (tmp_path / "file").stat().st_ino)]


def test_a_tree_is_synced_file_by_file_and_itself_last(tmp_path: Path, synced: list[tuple[int, int]]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"four")
    sync_tree(tmp_path)
    nodes = [inode for _, inode in synced]
    paths = (tmp_path, tmp_path / "folder", tmp_path / "folder" / "file")
    assert set(nodes) == {path.stat().st_ino for path in paths}
    assert nodes[-1] == tmp_path.stat().st_ino


def test_a_path_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nothing")
