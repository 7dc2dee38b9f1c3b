"""Progress of long work on stderr: a bar on a terminal, a line every 30 seconds elsewhere."""

import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

from tqdm import tqdm

LINE_EVERY_S = 30.0
Item = TypeVar("Item")


class Progress:
    """A context manager around work of `total` steps; None if their number is not known.

    On a terminal it draws a bar. Elsewhere a thread writes a line every `every_s` seconds, also while a step computes,
    and one at the end of work that took longer than that; shorter work writes nothing.
    """

    def __init__(self, label: str, total: int | None = None, *, every_s: float = LINE_EVERY_S) -> None:
        self.label = label
        self.total = total
        self.done = 0
        self._every_s = every_s
        self._stream = sys.stderr  # the lines go on where `bars_on_a_terminal_only` redirects stderr
        self._started = time.monotonic()
        self._ended = threading.Event()
        self._bar: tqdm[Any] | None = None
        self._thread: threading.Thread | None = None

    def advance(self, steps: int = 1) -> None:
        """Count that many more steps as done."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(steps)

    def describe(self, label: str) -> None:
        """Change the label, to that of the current step."""
        self.label = label
        if self._bar is not None:
            self._bar.set_description(label)

    def line(self) -> str:
        """The state of the work in one line: label, steps, seconds since the start."""
        steps = "" if self.total is None else f" {self.done} of {self.total},"
        return f"{self.label}:{steps} {time.monotonic() - self._started:.0f} s"

    def __enter__(self) -> "Progress":
        self._started = time.monotonic()
        if sys.stderr.isatty():
            self._bar = tqdm(desc=self.label, total=self.total, leave=False)
        else:
            self._thread = threading.Thread(target=self._write_lines, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self._bar is not None:
            self._bar.close()

    def _write_lines(self) -> None:
        written = False
        while not self._ended.wait(self._every_s):
            print(self.line(), file=self._stream, flush=True)
            written = True
        if written:
            print(f"{self.line()}, ended", file=self._stream, flush=True)


def progress(items: Iterable[Item], label: str, *, shown: bool = True) -> Iterator[Item]:
    """The items one by one, with progress on stderr while `shown`."""
    if not shown:
        yield from items
        return
    with Progress(label, len(items) if isinstance(items, Sized) else None) as bar:
        for item in items:
            yield item
            bar.advance()
