"""The form in which recurrences are written while a model is traced. Imports no torch, so that a command line may."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

Kind = Literal["loop", "doubling", "operator", "kernel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How a recurrence is written: `kind`, and for doubling the longest sequence it must be right for.

    loop      one step after another in Python; the definition, and the fastest form for training on a CPU
    doubling  Hillis-Steele: log2(T) passes without a loop; what TensorRT builds well
    operator  torch's scan operator, which becomes one ONNX Scan; what ONNX Runtime runs well
    kernel    mamba-ssm's CUDA kernel

    A recurrence whose decay is one number a head is matrix products in all of these but `loop`.
    """

    kind: Kind
    length: int | None = None


_form: ContextVar[Form | None] = ContextVar("form", default=None)
_heed: ContextVar["Heed | None"] = ContextVar("heed", default=None)


@dataclass(slots=True)
class Heed:
    """Whether the module had anything to write in the requested form."""

    paid: bool = False


@contextmanager
def scan_form(form: Form) -> Iterator[Heed]:
    """Inside, every recurrence is written in this form: while a model is traced, or to compare forms."""
    heed = Heed()
    form_token, heed_token = _form.set(form), _heed.set(heed)
    try:
        yield heed
    finally:
        _form.reset(form_token)
        _heed.reset(heed_token)


def current_form() -> Form | None:
    """The requested form; None outside of `scan_form`."""
    if heed := _heed.get():
        heed.paid = True
    return _form.get()
