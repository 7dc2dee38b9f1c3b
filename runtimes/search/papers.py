"""Theorem-like statements as papers hold them, and the two forms in which they are published. One paper a line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtimes.errors import InputError, one_line

SIZES = {"toy": 100, "tiny": 1_000, "small": 10_000, "medium": 50_000, "full": 500_000}  # statements of a collection
OLD_FORM = {"lemmas": "lemma", "theorems": "theorem"}  # lists of texts, under the plural of their type


@dataclass(frozen=True, kw_only=True, slots=True)
class Statement:
    """A lemma, theorem, definition, ... with its LaTeX."""

    type: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """A paper and its statements, in order; `empty` counts those that had no text and were left out.

    In the old form papers have neither id nor title: both are "".
    """

    arxiv_id: str
    title: str
    statements: tuple[Statement, ...]
    empty: int = 0


def read_papers(path: Path, statements: int | None = None) -> Iterator[Paper]:
    """The papers of a file, up to the one that holds statement number `statements`, which is cut there.

    `InputError` names the line that is no paper.
    """
    if statements is not None and statements < 1:
        raise InputError(f"expected to read 1 or more statements, found {statements}")
    left = statements
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if left == 0:
                    return
                paper = _paper(line, f"{path.name}:{number}")
                kept = paper.statements[:left]
                left = None if left is None else left - len(kept)
                yield Paper(arxiv_id=paper.arxiv_id, title=paper.title, statements=kept, empty=paper.empty)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected JSON lines in UTF-8, found {one_line(error)}") from error


def _paper(line: str, where: str) -> Paper:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a paper as JSON, found {one_line(error)}") from error
    if not isinstance(row, dict) or not ("statements" in row or row.keys() & OLD_FORM.keys()):
        raise InputError(f"{where}: expected an object with 'statements' or 'lemmas' and 'theorems', found {_cut(row)}")
    found = _new_form(row, where) if "statements" in row else _old_form(row, where)
    try:
        kept = tuple(statement for statement in found if statement.text.encode())
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: expected Unicode text, found half a surrogate pair") from error
    names = {name: row.get(name, "") for name in ("arxiv_id", "title")}
    for name, value in names.items():
        if not isinstance(value, str):
            raise InputError(f"{where}, {name}: expected a string, found {_cut(value)}")
    return Paper(**names, statements=kept, empty=len(found) - len(kept))


def _new_form(row: dict[str, Any], where: str) -> list[Statement]:
    result = []
    for i, entry in enumerate(_list(row, "statements", where), 1):
        if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in ("text", "type")):
            raise InputError(f"{where}, statement {i}: expected strings 'text' and 'type', found {_cut(entry)}")
        result.append(Statement(type=entry["type"], text=entry["text"].strip()))
    return result


def _old_form(row: dict[str, Any], where: str) -> list[Statement]:
    result = []
    for plural, kind in OLD_FORM.items():
        for i, text in enumerate(_list(row, plural, where), 1):
            if not isinstance(text, str):
                raise InputError(f"{where}, {plural} {i}: expected a string, found {_cut(text)}")
            result.append(Statement(type=kind, text=text.strip()))
    return result


def _list(row: dict[str, Any], name: str, where: str) -> list[Any]:
    value = row.get(name, [])
    if not isinstance(value, list):
        raise InputError(f"{where}, {name}: expected a list, found {_cut(value)}")
    return value


def _cut(value: Any) -> str:
    return ascii(value)[:80]
