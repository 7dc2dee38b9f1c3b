"""The fenced blocks of Markdown pages, and the commands in those of bash."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"<!-- not run: (.+) -->")
SERVES = "<!-- starts a server on ports 8000 to 8002 -->"
FENCE = re.compile(r"(?P<indent> *)```(?P<language>\w*)(?P<info>[^\n]*)")
TITLE = re.compile(r'title="([^"]+)"')
ASSIGNMENT = re.compile(r"[A-Z_]+=.*", re.DOTALL)
KEYWORDS = {"until", "do", "done", "while", "then"}
OPERATORS = {"|", "||", "&", "&&", ";", "(", ")"}
REDIRECTIONS = {">", ">>", "<", "2>"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A fenced block of a page.

    line    of its fence, counted from 1
    title   the path in the info string, for code that is a file
    reason  why a test cannot run it, or empty
    serves  whether it starts a Triton server on the default ports, and ends it
    """

    page: Path
    line: int
    language: str
    title: str
    reason: str
    serves: bool
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def markdown_pages() -> list[Path]:
    """The tracked Markdown files."""
    folders = ("docs", "deploy", "benchmarks", "model_repository", "runtimes")
    nested = (path for folder in folders for path in (ROOT / folder).rglob("*.md"))
    return sorted(path for path in [*ROOT.glob("*.md"), *nested] if "katex" not in path.parts)


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order; an assertion fails for a fence that is never closed."""
    blocks, lines = [], page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if start is None:
            start = number if FENCE.fullmatch(line) else None
        elif line.strip() == "```":
            blocks.append(_block(page, lines, start, number))
            start = None
    assert start is None, f"{page}: the fence of line {start} is not closed"
    return blocks


def _block(page: Path, lines: list[str], start: int, end: int) -> Block:
    opened = FENCE.fullmatch(lines[start])
    above = next((line for line in reversed(lines[:start]) if line.strip()), "")
    marker, title = NOT_RUN.fullmatch(above.strip()), TITLE.search(lines[start])
    assert opened
    indent = len(opened["indent"])
    return Block(
        page=page,
        line=start + 1,
        language=opened["language"],
        title=title[1] if title else "",
        reason=marker[1] if marker else "",
        serves=above.strip() == SERVES,
        text="\n".join(line[indent:] for line in lines[start + 1 : end]) + "\n",
    )


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands of a shell text as words, without assignments before them and without redirections."""
    for line in _logical_lines(text):
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
        words.whitespace_split = True
        words.commenters = "#"
        yield from _split(list(words))


def _logical_lines(text: str) -> Iterator[str]:
    """Lines, joined where one ends with a backslash or inside quotes."""
    pending = ""
    for line in text.splitlines():
        pending = pending + line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        yield pending
        pending = ""
    assert not pending, f"expected complete commands, found {pending!r}"


def _split(words: list[str]) -> Iterator[list[str]]:
    current: list[str] = []
    skip = False
    for word in [*words, ";"]:
        if skip:
            skip = False
        elif word in OPERATORS:
            if current:
                yield current
            current = []
        elif word in REDIRECTIONS:
            skip = True
        elif current or not (word in KEYWORDS or ASSIGNMENT.fullmatch(word)):
            current.append(word)
