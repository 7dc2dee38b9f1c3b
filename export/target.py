"""Target: one way of converting a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from export.source import Source
from runtimes.artifact import Check
from training.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """The properties of the files that a conversion wrote.

    built_with      settings that the bytes depend on besides library versions, such as the opset or the builder
    device          the device on which the artifact is run and verified
    not_run_reason  why this machine cannot run it, or None
    served          whether Triton has a backend for these files
    proxy_engine    the engine that is compared where this machine cannot run the artifact: it runs the model from which
                    the artifact was built, or the same weights
    checks          checks of the files themselves, such as their size; a failed one ends the cell
    """

    built_with: dict[str, str]
    device: str = "cpu"
    not_run_reason: str | None = None
    served: bool = True
    proxy_engine: str | None = None
    checks: Mapping[str, Check] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One way of converting a model.

    runtime        the engine that opens the artifact
    precisions     the precisions it has, the default first
    packages       the libraries whose versions the bytes depend on
    convert        writes the artifact's files for (source, precision) into an empty folder
    refuse         why a model cannot be converted, or None
    reads_texts    whether the bytes depend on the texts that language models are quantized on
    ensemble_rank  the ensemble of a model goes through its target of the lowest rank
    """

    name: str
    runtime: str
    precisions: Sequence[str]
    packages: Sequence[str]
    convert: Callable[[Source, str, Path], Built]
    refuse: Callable[[ModelSpec], str | None] = lambda spec: None
    reads_texts: bool = False
    ensemble_rank: int = 1
