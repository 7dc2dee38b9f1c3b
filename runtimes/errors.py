"""Errors, each with a text of one line: what was expected, what was found, and the remedy."""

import difflib
import importlib
from collections.abc import Collection, Iterable
from types import ModuleType


class SlipwayError(Exception):
    """The base of every error a user can meet. Its text is one line, fit to be printed as it is.

    exit_status  of a command that ends with it
    triton_code  the name of the code of Triton's TritonError in the answer of a Python backend
    """

    exit_status = 1
    triton_code = "INTERNAL"


class InputError(SlipwayError):
    """The command line, a request, or a file that the user gave is wrong."""

    exit_status = 2
    triton_code = "INVALID_ARG"


class MissingPackage(InputError):
    """An optional package is not installed; the text names the extra that brings it."""


class ArtifactError(SlipwayError):
    """A checkpoint, artifact or repository does not match its manifest."""


class EngineError(SlipwayError):
    """An engine cannot open or run an artifact on this machine."""


class Overloaded(EngineError):
    """A server refuses a request because its queue is full, or because the request waited too long."""

    triton_code = "UNAVAILABLE"


class ParityError(SlipwayError):
    """A converted model does not agree with the original."""


# Errors of other libraries for a program, a file or a shape that they do not support. A handler reports them, with
# their type (`error_text`), as the result of one engine or one conversion among many.
FOREIGN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError)


def require(module: str, *, extra: str = "", remedy: str = "") -> ModuleType:
    """Import `module`, or raise `MissingPackage` naming the extra that installs it, or another remedy."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = remedy or f"pip install '.[{extra}]'"
        raise MissingPackage(
            f"expected package '{module.partition('.')[0]}', found none usable ({one_line(error)}); "
            f"run in a checkout: {install}"
        ) from error


def error_text(error: BaseException, limit: int = 300) -> str:
    """The text of an error in one line, with its type where it is foreign: the text of a KeyError is only a name."""
    text = one_line(error, limit)
    return text if isinstance(error, SlipwayError | OSError) else f"{type(error).__name__}: {text}"


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error, or any other, without line breaks, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


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
