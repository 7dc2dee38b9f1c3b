"""The shared parts of command lines: one-line errors, exit statuses, argument groups, names, tables."""

import argparse
import ast
import functools
import itertools
import os
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

from runtimes.errors import InputError, MissingPackage, SlipwayError, one_line, require
from runtimes.errors import nearest as nearest
from runtimes.errors import unknown_name as unknown_name
from runtimes.host.gpu import DEVICES

Main = Callable[..., int]
Arguments = argparse._ActionsContainer  # a parser or a group of its arguments
INTERRUPTED = 130
REPOSITORY = Path("model_repository")
TAKES_SETTINGS = "_takes_settings"  # a default of parsers whose undeclared options are settings

# The extra of each package that the commands import without `require`.
EXTRAS = {
    "accelerate": "train",
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "peft": "statements",
    "psutil": "train",
    "sklearn": "strategy",
    "tokenizers": "train",
    "torch": "train",
    "torch_geometric": "strategy",
    "transformers": "train",
}

# The command that runs the modules' `main`, such as "slipway"; empty where they run as `python -m`.
program: ContextVar[str] = ContextVar("program", default="")


def command(main: Main) -> Main:
    """A `main` that ends in an exit status: 0 success, 1 failure, 2 wrong input, 130 interrupted; never a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except SlipwayError as error:
            print(f"error: {one_line(error, 2000)}", file=sys.stderr)
            return error.exit_status
        except ModuleNotFoundError as error:
            print(f"error: {one_line(_missing_package(error, main), 2000)}", file=sys.stderr)
            return MissingPackage.exit_status
        except BrokenPipeError:  # the reader of the output has ended, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python reports it again at its exit
            return SlipwayError.exit_status
        except OSError as error:  # a full disk, a folder that may not be written to
            print(f"error: {one_line(error, 2000)}", file=sys.stderr)
            return SlipwayError.exit_status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED
        except SystemExit as exit_:  # argparse leaves this way
            return exit_.code if isinstance(exit_.code, int) else 2

    return run


def _missing_package(error: ModuleNotFoundError, main: Main) -> MissingPackage:
    """The error that names the extra with the missing package; `error` itself is raised if no extra has it."""
    package = (error.name or "").partition(".")[0]
    if package not in EXTRAS:
        raise error
    extra = "export,train" if _module_of(main).startswith("export.") else EXTRAS[package]
    try:
        require(package, extra=extra)
    except MissingPackage as missing:
        return missing
    raise error  # the package is there; a part of it is not


def _module_of(main: Main) -> str:
    """The module of a command, also where it runs as `python -m MODULE`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if main.__module__ == "__main__" and spec else main.__module__


class Parser(argparse.ArgumentParser):
    """An argument parser for models at any place, for free settings (`--NAME VALUE`), and with errors of one line."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, more = self.parse_known_args(args, namespace)
        if more:
            option = next((each for each in more if each.startswith("-")), "")
            close = nearest(option, [name for name, action in self._option_string_actions.items() if _shown(action)])
            self.error(f"unrecognized arguments: {' '.join(more)}" + (f"; did you mean {close}" if close else ""))
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        given, free = self._split_settings(given) if self.get_default(TAKES_SETTINGS) else (given, [])
        found, more = super().parse_known_args(given, namespace)
        found.__dict__.pop(TAKES_SETTINGS, None)
        if hasattr(found, "models_option"):
            stray = list(itertools.takewhile(lambda each: not each.startswith("-"), more))  # models behind an option
            more = more[len(stray) :]
            named = [found.models] if isinstance(found.models, str) else found.models or []
            found.models = _split([*named, *stray, *found.models_option])
            del found.models_option
            self._check_models(found)
        return found, [*free, *more]

    def error(self, message: str) -> NoReturn:
        self.exit(InputError.exit_status, f"error: {message}; see {self.prog} --help\n")

    def _split_settings(self, given: list[str]) -> tuple[list[str], list[str]]:
        """The arguments that are declared, and pairs `--NAME VALUE` that are not; `--NAME=VALUE` becomes a pair."""
        declared, free, i = [], [], 0
        while i < len(given):
            name, equals, value = given[i].partition("=")
            if not name.startswith("--") or name == "--" or name in self._option_string_actions:
                declared.append(given[i])
                i += 1
            elif equals:
                free += [name, value]
                i += 1
            else:
                pair = given[i : i + 2]
                pair = pair[:1] if pair[-1].startswith("--") else pair  # `flags` refuses a name without a value
                free += pair
                i += len(pair)
        return declared, free

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


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Shows how many models a command takes, which is more exact than the `[MODEL ...]` of argparse."""

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        shown: str | None = getattr(action, "shown_as", None)
        return shown or super()._format_args(action, default_metavar)


def parser(module: str, summary: str, *examples: str, add_help: bool = True) -> Parser:
    """A parser whose help opens with commands to paste; without --help, for a command that has its own.

    The commands read `python -m MODULE`, or what `program` names.
    """
    prog = program.get() or f"python -m {module}"
    pasted = "\n".join(f"  {prog} {example}".rstrip() for example in examples)
    return Parser(
        prog=prog,
        description=f"{pasted}\n\n{summary}",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=add_help,
    )


class Names(argparse.Action):
    """Collects names: `onnx,torch`, `onnx torch` and a repeated option are the same; case does not matter.

    A name that is not among `known`, where that is given, is an `InputError` with the nearest one.
    """

    def __init__(self, *arguments: Any, known: Collection[str] = (), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.known = known

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = _split([values] if isinstance(values, str) else values)
        for name in given if self.known else ():
            if name not in self.known:
                raise unknown_name(self.dest, name, self.known, "see --help")
        found = getattr(namespace, self.dest, None)
        earlier = [] if found is self.default or found is None else found
        setattr(namespace, self.dest, [*earlier, *given])


def names_argument(to: Arguments, option: str, help: str, *, known: Collection[str] = (), **options: Any) -> None:
    """An option whose value is a list of names, separated by commas or repeated; `known` are the names there are."""
    listed = f"; of {', '.join(known)}" if known else ""
    options = {"default": [], "metavar": "NAME[,NAME]", **options}
    to.add_argument(option, action=Names, known=known, help=f"{help}{listed}", **options)


def models_argument(to: argparse.ArgumentParser, help: str, *, least: int = 0, most: int | None = None) -> None:
    """Models as positional arguments, and as --model for older scripts.

    The result is `arguments.models`, a list; or where `most` is 1 `arguments.model`, a name or None.
    """
    action: Any = to.add_argument("models", nargs="*", metavar="MODEL", help=help)
    action.shown_as = {(0, 1): "[MODEL]", (1, 1): "MODEL", (1, None): "MODEL [MODEL ...]"}.get((least, most))
    to.add_argument("--model", dest="models_option", action=Names, default=[], help=argparse.SUPPRESS)
    to.set_defaults(_models_least=least, _models_most=most)


def settings_argument(to: Arguments, help: str = "change one setting") -> None:
    """--set NAME=VALUE, repeated; and --NAME VALUE for every option that is not declared, wherever it stands.

    `arguments.set` holds the former and `parse_known_args` returns the latter, for `settings` and `flags`.
    """
    to.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help=f"{help}; --NAME VALUE is the same"
    )
    to.set_defaults(**{TAKES_SETTINGS: True})


def target_argument(to: Arguments, help: str, **options: Any) -> None:
    """--target as a list of names: separated by commas, or repeated."""
    names_argument(to, "--target", help, **options)


def precision_argument(to: Arguments, help: str, **options: Any) -> None:
    """--precision as a list of names: separated by commas, or repeated."""
    names_argument(to, "--precision", help, **options)


def artifact_arguments(to: argparse.ArgumentParser, *, target: str = "onnx", precision: str = "fp32") -> None:
    """The options that name one artifact of a model: --repository, --target, --precision."""
    group = to.add_argument_group("artifact")
    repository_argument(group)
    group.add_argument("--target", type=str.lower, default=target, help="target of the artifact (default: %(default)s)")
    group.add_argument(
        "--precision", type=str.lower, default=precision, help="precision of the artifact (default: %(default)s)"
    )


def repository_argument(to: Arguments, help: str = "folder of published artifacts") -> None:
    """--repository, the model repository."""
    to.add_argument("--repository", type=Path, default=REPOSITORY, metavar="DIR", help=f"{help} (default: %(default)s)")


def mounted_at_argument(to: argparse.ArgumentParser) -> None:
    """--mounted-at, the path of the model repository on the server that reads it."""
    to.add_argument("--mounted-at", type=Path, help="path of the repository in the container that serves it "
                    "(default: its path here)")  # fmt: skip


def device_arguments(to: argparse.ArgumentParser, *, threads: int = 1) -> None:
    """--device and --threads of an engine."""
    group = to.add_argument_group("engine")
    group.add_argument("--device", type=str.lower, choices=DEVICES, default="cpu",
                       help="cpu or cuda; an engine without the latter uses the CPU (default: cpu)")  # fmt: skip
    group.add_argument("--threads", type=_positive, default=threads, metavar="COUNT",
                       help="threads of one engine (default: %(default)s)")  # fmt: skip


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


def json_argument(to: Arguments) -> None:
    """--json, with which a command prints JSON only."""
    to.add_argument("--json", action="store_true", help="print JSON only")


def hidden_alias(to: Arguments, old: str, new: str) -> None:
    """Accept the option `new` by its name in the version before, too; the help does not show that name."""
    to._option_string_actions[old] = to._option_string_actions[new]


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
    for name, value in itertools.zip_longest(arguments[::2], arguments[1::2]):
        if not name.startswith("--") or value is None or value.startswith("--"):
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
    """The commands in a package's folder with the first line of each module's docstring; no module is imported.

    Modules under their names of an earlier version are left out.
    """
    rows = []
    for path in sorted(package.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\n@command\n" in text and "previous_names" not in path.parts:
            parts = path.relative_to(package.parent).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__main__")
            summary = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
            rows.append((f"python -m {module}", summary.partition(" python -m")[0].rstrip(":.")))
    return table(["command", "purpose"], rows)


def _split(names: Iterable[str]) -> list[str]:
    """Names in lower case, those with commas in parts; a path, which has a separator, stays as it is."""
    parts = ([name] if "/" in name or os.sep in name else name.lower().split(",") for name in names)
    return [part.strip() for own in parts for part in own if part.strip()]


def _shown(action: argparse.Action) -> bool:
    return action.help != argparse.SUPPRESS


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, found '{text}'")
    return int(text)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
