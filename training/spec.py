"""ModelSpec: the declaration of a model, split by the code that reads it. No torch is imported until it is called."""

import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from runtimes import plugins
from runtimes.artifact import Check
from runtimes.errors import InputError, unknown_name
from runtimes.tensors import Signature, Tensors
from training.config import Config

if TYPE_CHECKING:
    from torch import nn

    from training.language_model import LanguageModel
    from training.recipe import Training


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """Parameters under `prefix` that are not trained: they come from `source` at `revision` and are never stored."""

    prefix: str
    source: str
    revision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """The largest difference between an output and torch's: |difference| <= absolute + relative * |torch|."""

    absolute: float
    relative: float

    def __post_init__(self) -> None:
        for name in ("absolute", "relative"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"tolerance: expected a finite {name} part of 0 or more, found {value}")


def identity(module: "nn.Module") -> "nn.Module":
    """The module itself."""
    return module


def unmasked(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """The candidate's outputs unchanged: no near-tie is masked."""
    return got


@dataclass(frozen=True, kw_only=True, slots=True)
class Interface:
    """The tensors of a model and the module that computes them.

    signature       the tensors of a model of this config
    build           the module of this config; its arguments and results are the signature's, in order
    part            this model's part of the module of `build`, for a model with a parent
    wrap            the module that is traced: the model, and outputs that only a pipeline needs
    frozen          the parameters that are not trained
    assets          files that the pipeline reads, such as a tokenizer, by name
    fixed           settings of the config that the model's name implies and that cannot be set
    resolve_config  the config with settings that follow from others, such as the width of the base that it names
    absent          why a checkpoint of this config has no such part, or None
    """

    signature: Callable[[Config], Signature]
    build: Callable[[Config], "nn.Module"]
    part: Callable[["nn.Module"], "nn.Module"] = identity
    wrap: Callable[["nn.Module"], "nn.Module"] = identity
    frozen: Callable[[Config], tuple[Frozen, ...]] = lambda config: ()
    assets: Callable[[Config], Mapping[str, bytes]] = lambda config: {}
    fixed: tuple[str, ...] = ()
    resolve_config: Callable[[Config], Config] = dict
    absent: Callable[[Config], str | None] = lambda config: None


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """How a converted model is compared with the original.

    draw_inputs     realistic inputs without state for these sizes, drawn from `sample_inputs` (real inputs) where given
    agreement       the comparison of decisions: (candidate, original, tolerance) -> checks by name
    tolerance       by precision; a precision without one cannot be verified and is not exported
    parity_inputs   real inputs without state, from the sample inputs, in batches; their outputs are compared as one
    mask_near_ties  the candidate's outputs, with the original's where the original's own decision is a near-tie;
                    `agreement` has to limit the share of these
    sequence        (module, inputs) -> the original's outputs without state for whole sequences, from a state of zeros;
                    for a model whose own time axis is a single step
    """

    draw_inputs: Callable[[Config, np.random.Generator, Mapping[str, int], Tensors], Tensors]
    agreement: Callable[[Tensors, Tensors, Tolerance], dict[str, Check]]
    tolerance: Mapping[str, Tolerance]
    parity_inputs: Callable[[Config, Tensors], Iterable[Tensors]] = lambda config, sample_inputs: ()
    mask_near_ties: Callable[[Tensors, Tensors, Tolerance], Tensors] = unmasked
    sequence: Callable[["nn.Module", Tensors], Tensors] | None = None

    def __post_init__(self) -> None:
        if not self.tolerance:
            raise ValueError("parity: expected a tolerance for at least one precision, found none")


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What the exporter needs besides the module.

    skips           why a target is not for this model, by target
    fp32_modules    parts of the module that stay in float32 when the rest becomes int8
    calibration     real inputs of one row, drawn from `sample_inputs`, to calibrate int8 on; None draws all sizes
    language_model  the decoder inside (config, module, sample inputs), for engines that run whole language models
    """

    skips: Mapping[str, str] = field(default_factory=dict)
    fp32_modules: tuple[str, ...] = ()
    calibration: Callable[[Config, Tensors], Iterable[Tensors]] | None = None
    language_model: Callable[[Config, "nn.Module", Tensors], "LanguageModel"] | None = None

    def __post_init__(self) -> None:
        if empty := [target for target, reason in self.skips.items() if not reason]:
            raise ValueError(f"export: expected a reason for each skipped target, found none for {', '.join(empty)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model as training, export and parity see it.

    pipeline       the name of its pipeline
    presets        configs by name of the preset
    parent         the model whose checkpoint this one is a part of; empty for a model with a checkpoint of its own
    training_path  `module:CONSTANT` of the `Training` of this model; empty where it is not trained by this project.
                   It is imported when `training` is read, and so no artifact depends on code that only trains.
    """

    name: str
    pipeline: str
    presets: Mapping[str, Config]
    interface: Interface
    parity: Parity
    export: Export = field(default_factory=Export)
    parent: str = ""
    training_path: str = ""

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"expected a model name of letters, digits and underscores, found '{self.name}'")
        if self.parent == self.name:
            raise ValueError(f"{self.name}: expected another model as parent, found itself")
        if self.parent and self.training_path:
            raise ValueError(f"{self.name}: a part of {self.parent} has no training, found {self.training_path}")

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint that holds this model."""
        return self.parent or self.name

    @property
    def trained(self) -> bool:
        """False for a part, which is trained with its parent, and for a model that was trained elsewhere."""
        return bool(self.training_path)

    @property
    def training(self) -> "Training":
        """How the model is trained; `InputError` for a part and for a model that was trained elsewhere."""
        if self.parent:
            raise InputError(f"{self.name} is a part of {self.parent}; train that")
        if not self.training_path:
            raise InputError(f"{self.name}: expected a model that is trained here, found one without a recipe")
        found: Training = pkgutil.resolve_name(self.training_path)
        return found

    def preset(self, name: str) -> Config:
        """The config of this preset; `InputError` with the known presets."""
        if name not in self.presets:
            raise InputError(f"{self.name}: expected a preset of {', '.join(self.presets)}; found '{name}'")
        return self.presets[name]


def all_specs() -> dict[str, ModelSpec]:
    """Every model, by name."""
    packages = plugins.names("training.models")
    specs = [spec for package in packages for spec in plugins.load("training.models", package, "SPECS")]
    return {spec.name: spec for spec in specs}


def find_spec(name: str) -> ModelSpec:
    """The model of this name; `InputError` with the nearest name."""
    specs = all_specs()
    if name not in specs:
        raise unknown_name("model", name, specs, "list them: slipway list")
    return specs[name]
