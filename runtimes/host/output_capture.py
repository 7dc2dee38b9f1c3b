"""Redirection of unwanted output of libraries."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO


@contextmanager
def bars_on_a_terminal_only() -> Iterator[None]:
    """Inside, output to stderr is shown on a terminal and discarded elsewhere; errors are raised as exceptions."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(StringIO()):
        yield


@contextmanager
def native_talk_on_stderr() -> Iterator[None]:
    """Inside, native code that writes to the standard output writes to stderr, so that stdout holds only the answer."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
