"""Progress bars of libraries, where nobody sees them move."""

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
