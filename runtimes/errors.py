"""What can go wrong, as one line each: what was expected, what was found, what to do."""

import importlib
from types import ModuleType


class SlipwayError(Exception):
    """The base of every error a user can meet. Its text is one line, fit to be printed as it is.

    exit_status  of a command that ends with it
    triton_code  what a Python backend answers with: the name of a code of Triton's TritonError
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
    """A checkpoint, artifact or repository does not hold what its manifest says."""


class EngineError(SlipwayError):
    """An engine cannot open or run an artifact on this machine."""


class Overloaded(EngineError):
    """A server refuses a request because too many wait already, or because it waited too long."""

    triton_code = "UNAVAILABLE"


class ParityError(SlipwayError):
    """A converted model does not say what the original says."""


# What other libraries raise for a program, a file or a shape they cannot take. Who catches these reports them, with
# their kind (`said`), as the result of one engine or one conversion among many.
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
    """The text of an error in one line; of one that is not ours, with its kind: a KeyError's text is a name only."""
    text = one_line(error, limit)
    return text if isinstance(error, SlipwayError | OSError) else f"{type(error).__name__}: {text}"


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """The text of an error, or any other, without line breaks, cut to `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
