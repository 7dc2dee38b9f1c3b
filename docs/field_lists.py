"""An extension of mkdocstrings' parser: the aligned field lists of our docstrings become Markdown lists.

name   text of the field
       that continues here
"""

import re
from typing import Any

import griffe

FIELD = re.compile(r"(?P<name>[a-z_][a-z0-9_]*) {2,}(?P<text>\S.*)")


def with_lists(docstring: str) -> str:
    """The docstring with a list item for each field; other lines stay as they are."""
    lines: list[str] = []
    inside = False
    for line in docstring.splitlines():
        if field := FIELD.fullmatch(line):
            lines += [] if inside else [""]
            lines.append(f"- `{field['name']}`: {field['text']}")
            inside = True
        elif inside and line.startswith("  ") and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            inside = False
            lines.append(line)
    return "\n".join(lines)


class FieldLists(griffe.Extension):
    """Applies `with_lists` to every docstring."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = with_lists(obj.docstring.value)
