"""What every command line shares: one-line errors, exit statuses, tables, progress."""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from runtimes.errors import InputError, SlipwayError, one_line

Main = Callable[..., int]
INTERRUPTED = 130


def command(main: Main) -> Main:
    """A `main` that ends in an exit status: 0 fine, 1 something failed, 2 the input was wrong; never in a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except SlipwayError as error:
            print(f"error: {one_line(error, 2000)}", file=sys.stderr)
            return error.exit_status
        except OSError as error:  # a full disk, a folder that may not be written to
            print(f"error: {one_line(error, 2000)}", file=sys.stderr)
            return SlipwayError.exit_status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except SystemExit as exit_:  # argparse leaves this way
            return exit_.code if isinstance(exit_.code, int) else 2

    return run


def parser(module: str, summary: str, *examples: str, add_help: bool = True) -> argparse.ArgumentParser:
    """A parser whose help opens with commands to paste; without --help, for a command with its own."""
    pasted = "\n".join(f"  python -m {module} {example}".rstrip() for example in examples)
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=f"{pasted}\n\n{summary}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )


def settings(pairs: Iterable[str]) -> dict[str, str]:
    """`["a=1", "b=x"]` as a dict; `InputError` for a pair without '='."""
    result = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set: expected NAME=VALUE, found '{pair}'")
        result[name] = value
    return result


def flags(arguments: Sequence[str]) -> dict[str, str]:
    """`["--a-b", "1"]` as {"a_b": "1"}; `InputError` for what is not a name followed by its value."""
    result = {}
    for name, value in zip_longest(arguments[::2], arguments[1::2]):
        if not name.startswith("--") or value is None:
            raise InputError(f"expected --NAME VALUE, found '{name}'{'' if value is None else f' {value}'}")
        result[name[2:].replace("-", "_")] = value
    return result


def existing_folder(path: str | Path, purpose: str) -> Path:
    """The path; `InputError` unless it is a folder."""
    folder = Path(path)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise InputError(f"expected a folder with {purpose} at {folder}, found {found}")
    return folder


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows in aligned columns; numbers stand on the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(header), *cells]) for i in range(len(header))]
    lines = ["  ".join(name.ljust(width) for name, width in zip(header, widths, strict=True)).rstrip()]
    lines.append("  ".join("-" * width for width in widths))
    for row in cells:
        aligned = (
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        )
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
