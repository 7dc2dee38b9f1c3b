"""The output of a running server: its last lines are kept, and all are copied to a file or a stream."""

import collections
import contextlib
import functools
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

KEPT_LINES = 2_000
LINE_BYTES = 16 << 10  # a longer line counts as several
FILE_BYTES = 64 << 20
DRAIN_TIMEOUT_S = 2.0  # a process that left the server's session may hold the pipe open


class ServerLog:
    """Reads `output` to its end in a thread, so that the server never waits for a reader of its log.

    Its lines also go to `copy`: a stream in binary mode, or a file, to whose end it appends and which becomes
    FILE.1 whenever it has 64 MiB. Copying stops where it fails (a full disk, a closed pipe).
    """

    def __init__(self, output: IO[bytes], copy: Path | IO[bytes] | None) -> None:
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._closing = contextlib.ExitStack()
        self._write = self._writer(copy)
        self._thread = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._thread.start()

    def lines(self) -> list[str]:
        """The last lines so far, without empty ones."""
        return list(self._lines.copy())

    def drain(self) -> None:
        """The whole output of a server that has ended is among the lines and in the copy."""
        self._thread.join(DRAIN_TIMEOUT_S)

    def _writer(self, copy: Path | IO[bytes] | None) -> Callable[[bytes], None] | None:
        if isinstance(copy, Path):
            return self._closing.enter_context(RotatedFile(copy)).write
        return functools.partial(write_through, copy) if copy else None

    def _read(self, output: IO[bytes]) -> None:
        with self._closing, output:
            for line in iter(functools.partial(output.readline, LINE_BYTES), b""):
                if text := line.decode(errors="replace").rstrip():
                    self._lines.append(text)
                if self._write is not None:
                    try:
                        self._write(line)
                    except (OSError, ValueError):  # ValueError is that of a closed stream
                        self._write = None


def write_through(stream: IO[bytes], line: bytes) -> None:
    stream.write(line)
    stream.flush()


class RotatedFile:
    """A file that grows at its end; before it would have more than 64 MiB it becomes FILE.1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = path.open("ab", buffering=0)

    def __enter__(self) -> "RotatedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, line: bytes) -> None:
        # Not a device or pipe, nor a link to one such as /dev/stdout.
        if os.fstat(self.file.fileno()).st_size + len(line) > FILE_BYTES and self._is_regular():
            self.file.close()
            os.replace(self.path, f"{self.path}.1")
            self.file = self.path.open("ab", buffering=0)
        self.file.write(line)

    def _is_regular(self) -> bool:
        return self.path.exists() and stat.S_ISREG(self.path.lstat().st_mode)
