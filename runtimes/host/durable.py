"""Files and folders that are on the disk, and not only in memory: fsync."""

import os
from pathlib import Path
from typing import IO


def sync_stream(stream: IO[bytes]) -> None:
    """What was written to an open file is on the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """A file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Everything below a folder, and the folder itself, is on the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
