"""What libraries say of their own accord, kept from where it does not belong."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO


@contextmanager
def bars_on_a_terminal_only() -> Iterator[None]:
    """What is written to stderr meanwhile is seen on a terminal and lost elsewhere; errors travel as exceptions."""
    if sys.stderr.isatty():
        yield
        return
    with redirect_stderr(StringIO()):
        yield


@contextmanager
def native_talk_on_stderr() -> Iterator[None]:
    """What code outside Python writes to the standard output goes to stderr meanwhile: an answer there stays alone."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
