"""A server's log is bounded in memory and on disk, and a copy that fails does not stop the server."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from runtimes.host import process_log
from runtimes.host.process_log import KEPT_LINES, LINE_BYTES, ServerLog


@pytest.fixture
def pipe() -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """What a server's output is read from, and what it writes to."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as output, os.fdopen(write, "wb") as server:
        yield output, server


def test_the_last_lines_are_kept_and_no_more(pipe: tuple[IO[bytes], IO[bytes]]) -> None:
    output, server = pipe
    log = ServerLog(output, None)
    with server:
        for number in range(KEPT_LINES + 10):
            server.write(f"line {number}\n\n".encode())
    log.drain()
    assert log.lines() == [f"line {number}" for number in range(10, KEPT_LINES + 10)]


def test_a_line_without_an_end_is_kept_in_pieces(pipe: tuple[IO[bytes], IO[bytes]]) -> None:
    output, server = pipe
    log = ServerLog(output, None)
    with server:
        server.write(b"x" * (2 * LINE_BYTES + 1))
    log.drain()
    assert [len(line) for line in log.lines()] == [LINE_BYTES, LINE_BYTES, 1]


def test_a_file_that_gets_too_long_becomes_the_one_before(
    pipe: tuple[IO[bytes], IO[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_log, "FILE_BYTES", 40)
    (tmp_path / "log").write_text("from the last start\n")
    output, server = pipe
    log = ServerLog(output, tmp_path / "log")
    with server:
        for number in range(9):
            server.write(f"line {number}\n".encode())
    log.drain()
    assert (tmp_path / "log.1").read_text() == "line 2\nline 3\nline 4\nline 5\nline 6\n"
    assert (tmp_path / "log").read_text() == "line 7\nline 8\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_no_file_is_not_moved(
    pipe: tuple[IO[bytes], IO[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_log, "FILE_BYTES", 4)
    (tmp_path / "target").touch()
    (tmp_path / "link").symlink_to(tmp_path / "target")  # /dev/stdout is one, too
    output, server = pipe
    log = ServerLog(output, tmp_path / "link")
    with server:
        server.write(b"line 1\nline 2\n")
    log.drain()
    assert (tmp_path / "target").read_text() == "line 1\nline 2\n"


def test_a_copy_that_cannot_be_written_is_given_up_and_the_server_goes_on(pipe: tuple[IO[bytes], IO[bytes]]) -> None:
    read, write = os.pipe()
    os.close(read)
    output, server = pipe
    with os.fdopen(write, "wb", buffering=0) as broken, server:
        log = ServerLog(output, broken)
        for _ in range(KEPT_LINES):
            server.write(b"a line that nobody takes, longer in sum than a pipe holds\n")
        server.close()
        log.drain()
    assert len(log.lines()) == KEPT_LINES
