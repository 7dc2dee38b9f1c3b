"""What all command lines share: one-line errors, exit statuses, argument groups, names, tables."""

import argparse
import ast
import difflib
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextvars import ContextVar
from itertools import zip_longest
from pathlib import Path
from typing import Any

from runtimes.errors import InputError, SlipwayError, one_line
from runtimes.host.gpu import DEVICES

Main = Callable[..., int]
INTERRUPTED = 130
REPOSITORY = Path("model_repository")

# The command that runs the modules' `main`, such as "slipway"; empty where they run as `python -m`.
program: ContextVar[str] = ContextVar("program", default="")


def command(main: Main) -> Main:
    """A `main` that ends in an exit status: 0 success, 1 failure, 2 wrong input, 130 interrupted; never a traceback."""

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


class Parser(argparse.ArgumentParser):
    """An argument parser that merges the values of hidden aliases into the arguments they stand for."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, more = super().parse_known_args(args, namespace)
        if (named := getattr(found, "models_option", None)) is not None:
            del found.models_option
            found.models = [*_split([found.models] if isinstance(found.models, str) else found.models or []), *named]
            self._check_models(found)
        return found, more

    def _check_models(self, found: argparse.Namespace) -> None:
        least, most = self.get_default("_models_least"), self.get_default("_models_most")
        vars(found).pop("_models_least", None), vars(found).pop("_models_most", None)
        if len(found.models) < least:
            self.error("the following arguments are required: MODEL")
        if most == 1:
            if len(found.models) > 1:
                self.error(f"expected one MODEL, found {', '.join(found.models)}")
            found.model = found.models[0] if found.models else None
            del found.models


def parser(module: str, summary: str, *examples: str, add_help: bool = True) -> Parser:
    """A parser whose help opens with commands to paste; without --help, for a command that has its own.

    The commands read `python -m MODULE`, or what `program` names.
    """
    prog = program.get() or f"python -m {module}"
    pasted = "\n".join(f"  {prog} {example}".rstrip() for example in examples)
    return Parser(
        prog=prog,
        description=f"{pasted}\n\n{summary}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )


class Names(argparse.Action):
    """Collects names: `onnx,torch`, `onnx torch` and a repeated option are the same; case does not matter."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = _split([values] if isinstance(values, str) else values)
        known = getattr(namespace, self.dest, None)
        earlier = [] if known is self.default or known is None else known
        setattr(namespace, self.dest, [*earlier, *given])


def models_argument(to: argparse.ArgumentParser, help: str, *, least: int = 0, most: int | None = None) -> None:
    """Models as positional arguments, and as --model for older scripts.

    The result is `arguments.models`, a list; or where `most` is 1 `arguments.model`, a name or None.
    """
    to.add_argument("models", nargs="*", metavar="MODEL", help=help)
    to.add_argument("--model", dest="models_option", action=Names, default=[], help=argparse.SUPPRESS)
    to.set_defaults(_models_least=least, _models_most=most)


def target_argument(to: argparse.ArgumentParser, help: str, **options: Any) -> None:
    """--target as a list of names: separated by commas, or repeated."""
    to.add_argument("--target", action=Names, default=options.pop("default", []), metavar="NAME[,NAME]", help=help,
                    **options)  # fmt: skip


def precision_argument(to: argparse.ArgumentParser, help: str) -> None:
    """--precision as a list of names: separated by commas, or repeated."""
    to.add_argument("--precision", action=Names, default=[], metavar="NAME[,NAME]", help=help)


def artifact_arguments(to: argparse.ArgumentParser, *, target: str = "onnx", precision: str = "fp32") -> None:
    """The options that name one artifact of a model: --repository, --target, --precision."""
    repository_argument(to)
    to.add_argument("--target", type=str.lower, default=target, help="target of the artifact (default: %(default)s)")
    to.add_argument(
        "--precision", type=str.lower, default=precision, help="precision of the artifact (default: %(default)s)"
    )


def repository_argument(to: argparse.ArgumentParser, help: str = "folder of published artifacts") -> None:
    """--repository, the model repository."""
    to.add_argument("--repository", type=Path, default=REPOSITORY, help=f"{help} (default: %(default)s)")


def mounted_at_argument(to: argparse.ArgumentParser) -> None:
    """--mounted-at, the path of the model repository on the server that reads it."""
    to.add_argument("--mounted-at", type=Path, help="path of the repository in the container that serves it "
                    "(default: its path here)")  # fmt: skip


def device_arguments(to: argparse.ArgumentParser, *, threads: int = 1) -> None:
    """--device and --threads of an engine."""
    to.add_argument("--device", choices=DEVICES, default="cpu",
                    help="cpu or cuda; an engine without the latter uses the CPU (default: cpu)")  # fmt: skip
    to.add_argument("--threads", type=int, default=threads, help="threads of one engine (default: %(default)s)")


def input_arguments(to: argparse.ArgumentParser) -> None:
    """--input, the file with a request, and --example, which prints one."""
    to.add_argument("--input", type=Path, help="file with the request as JSON; - for standard input")
    to.add_argument("--example", action="store_true", help="print a valid request instead")


def read_input(path: Path | None) -> bytes:
    """The bytes of the file of --input, as they were given; `InputError` without a readable one."""
    if path is None:
        raise InputError("expected --input FILE with a request, found none; --example prints one to start from")
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, found {one_line(error)}") from error


def json_argument(to: argparse.ArgumentParser) -> None:
    """--json, with which a command prints JSON only."""
    to.add_argument("--json", action="store_true", help="print JSON only")


def hidden_alias(to: argparse.ArgumentParser, old: str, new: str) -> None:
    """The option `new` also by its name in the version before, which the help does not show."""
    to._option_string_actions[old] = to._option_string_actions[new]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, or None if none is like it."""
    found = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return found[0] if found else None


def unknown_name(kind: str, name: str, known: Collection[str], remedy: str) -> InputError:
    """The error for a name that is not known: the nearest one, else all if they are few, and the remedy."""
    if close := nearest(name, known):
        return InputError(f"expected a known {kind}, found '{name}'; did you mean '{close}'? {remedy}")
    listed = f" of {', '.join(sorted(known))}" if 0 < len(known) <= 8 else ""
    return InputError(f"expected a known {kind}{listed}, found '{name}'; {remedy}")


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
    """Rows in aligned columns; numbers are aligned on the right."""
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


def command_table(package: Path) -> str:
    """The commands in a package's folder with the first line of each module's docstring; no module is imported."""
    rows = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\n@command\n" in text:
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__main__")
            summary = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0].partition(": python -m")[0]
            rows.append((f"python -m {module}", summary))
    return table(["command", "purpose"], rows)


def _split(names: Iterable[str]) -> list[str]:
    return [part.strip().lower() for name in names for part in name.split(",") if part.strip()]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
