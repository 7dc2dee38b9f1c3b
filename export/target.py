"""Target: one way of converting a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.source import Source
from runtimes.device import gpu
from training.spec import ModelSpec


def always(_: object) -> None:
    """No objection."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One way of converting a model, and how the result is run and served.

    runtime      the engine that opens the artifact
    triton       the Triton backend that serves it, or None if Triton does not
    precisions   what can be asked for, the default first
    packages     the libraries whose versions the bytes depend on
    refuse       the reason why a model cannot be converted, or None
    idle         the reason why this machine can build but not run the artifact, or None
    convert      writes the artifact's files for (source, precision) into an empty folder, and says with what
    """

    name: str
    runtime: str
    triton: str | None
    precisions: Sequence[str]
    packages: Sequence[str]
    convert: Callable[[Source, str, Path], dict[str, str]]
    refuse: Callable[[ModelSpec], str | None] = always
    idle: Callable[[str], str | None] = always

    @property
    def device(self) -> str:
        """Where parity is proved: on the GPU if this machine has one and the target is for it."""
        return "cuda" if self.runtime == "tensorrt" and gpu() else "cpu"
