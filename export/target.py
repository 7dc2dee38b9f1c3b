"""Target: one way of converting a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.source import Source
from training.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What a conversion has to say about the files it wrote.

    built_with  what the bytes depend on besides library versions, such as the opset or the builder
    device      where the artifact is to be run and proved
    idle        the reason why this machine cannot run it, or None
    served      whether Triton has a backend for these files
    stand_in    the engine that runs the ONNX file the artifact was built from; used where the artifact is idle
    """

    built_with: dict[str, str]
    device: str = "cpu"
    idle: str | None = None
    served: bool = True
    stand_in: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One way of converting a model.

    runtime     the engine that opens the artifact
    precisions  what can be asked for, the default first
    packages    the libraries whose versions the bytes depend on
    convert     writes the artifact's files for (source, precision) into an empty folder
    refuse      the reason why a model cannot be converted, or None
    """

    name: str
    runtime: str
    precisions: Sequence[str]
    packages: Sequence[str]
    convert: Callable[[Source, str, Path], Built]
    refuse: Callable[[ModelSpec], str | None] = lambda spec: None
