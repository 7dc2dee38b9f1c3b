"""ModelSpec: what a model is, for everyone else. Recipe: how it learns."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtimes import plugins
from runtimes.artifact import Check
from runtimes.errors import InputError
from runtimes.tensors import Signature, Tensors

if TYPE_CHECKING:
    from torch import nn

    from training.language_model import LanguageModel

Config = dict[str, Any]
Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A size of a model: its config, and how it is trained by default."""

    config: Config
    training: Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """Parameters under `prefix` that are not trained but come from `source` at `revision`, and are never stored."""

    prefix: str
    source: str
    revision: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far an output may lie from torch's: |difference| <= absolute + relative * |torch|."""

    absolute: float
    relative: float


def identity(module: "nn.Module") -> "nn.Module":
    """The module itself."""
    return module


def unmasked(got: Tensors, want: Tensors, tolerance: Tolerance) -> Tensors:
    """The candidate's outputs unchanged: no near-tie is masked."""
    return got


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSpec:
    """A model as training, export and parity see it. Nothing here imports torch until it is called.

    signature    the tensors of a model of this config
    build        the module of this config: its arguments and results are the signature's, in order
    draw_inputs  realistic inputs without state for these sizes, drawn from `sample_inputs` (real inputs) where given
    agreement    the comparison of decisions: (candidate, original, tolerance) -> checks by name
    mask_near_ties  the candidate's outputs, with the original's where the original itself hung on a near-tie;
                 `agreement` has to limit how much that is
    sequence     (module, inputs) -> what the original says to whole sequences at once, from a state of zeros, without
                 state; for a model whose own time axis is a single step
    parity_inputs  real inputs without state, from the sample inputs, batch by batch; their outputs are compared as one
    tolerance    by precision; a precision without one cannot be proved and so is not exported
    skips        the reason why a target is not for this model, by target
    exact        parts of the module that stay in float32 when the rest becomes int8
    fixed        what of the config makes the model what its name says, and cannot be set
    resolve_config       completes a config with what follows from it, such as the width of the base it names
    implied      the training settings that follow from others, such as those of a profile; what is set by hand wins
    assets       files that the pipeline reads, such as a tokenizer, by name
    checkpoint   the model whose checkpoint this one is cut from; its own name unless it is a part of another
    part         the part of that checkpoint's module that this model is
    exported     what is traced of it: its answers, and what a pipeline needs beside them
    absent       the reason why a checkpoint of this config has no such part, or None
    embedder     opens a checkpoint for embedding whole collections, if the model does that
    calibration  real inputs of one row, drawn from `sample_inputs`, to calibrate int8 on; else draws of all sizes
    notes        what each setting means, for --help
    sweep        the experiments of training.sweep, if the model has any
    language_model  the decoder inside (config, module, sample inputs), for engines that run whole language models
    """

    name: str
    pipeline: str
    presets: Mapping[str, Preset]
    signature: Callable[[Config], Signature]
    build: Callable[[Config], "nn.Module"]
    draw_inputs: Callable[[Config, np.random.Generator, Mapping[str, int], Tensors], Tensors]
    agreement: Callable[[Tensors, Tensors, Tolerance], dict[str, Check]]
    tolerance: Mapping[str, Tolerance]
    recipe: Callable[[], type["Recipe"]]
    frozen: Callable[[Config], tuple[Frozen, ...]] = lambda config: ()
    skips: Mapping[str, str] = field(default_factory=dict)
    mask_near_ties: Callable[[Tensors, Tensors, Tolerance], Tensors] = unmasked
    exact: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    resolve_config: Callable[[Config], Config] = dict
    implied: Callable[[Config, Config], Config] = lambda config, training: training
    assets: Callable[[Config], Mapping[str, bytes]] = lambda config: {}
    sequence: Callable[["nn.Module", Tensors], Tensors] | None = None
    parity_inputs: Callable[[Config, Tensors], Iterable[Tensors]] = lambda config, sample_inputs: ()
    checkpoint: str = ""
    part: Callable[["nn.Module"], "nn.Module"] = identity
    exported: Callable[["nn.Module"], "nn.Module"] = identity
    absent: Callable[[Config], str | None] = lambda config: None
    embedder: Callable[..., "TextEmbedder"] | None = None
    calibration: Callable[[Config, Tensors], Iterable[Tensors]] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)
    sweep: "Sweep | None" = None
    language_model: Callable[[Config, "nn.Module", Tensors], "LanguageModel"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", self.checkpoint or self.name)

    @property
    def trained(self) -> bool:
        """False for a part: it is trained with the model whose checkpoint it is cut from."""
        return self.checkpoint == self.name

    def preset(self, name: str) -> Preset:
        """The preset; `InputError` names those there are."""
        if name not in self.presets:
            raise InputError(f"{self.name}: expected a preset of {', '.join(self.presets)}; found '{name}'")
        return self.presets[name]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Experiments to be compared in one table and one plot.

    runs     the changed settings of each experiment, by name; from the config and the training settings they change
    columns  the metrics of the table
    plotted  the metrics across and up; a run or a baseline that lacks the first is a line
    """

    runs: Callable[[Config, Config], Mapping[str, Mapping[str, str]]]
    columns: Sequence[str]
    plotted: tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenInference:
    """Texts that a frozen model has to read.

    identity  names the model, its tokenizer and its settings
    lengths   the length of each text in tokens
    run        the model's output for each text of a batch
    """

    namespace: str
    identity: Mapping[str, Any]
    texts: Sequence[str]
    lengths: Callable[[Sequence[str]], Sequence[int]]
    run: Callable[[Sequence[str]], Sequence[np.ndarray]]


class TextEmbedder(Protocol):
    """A model that embeds texts; made from (checkpoint, *, device, precision, padded_size)."""

    padded_size: int  # tokens of a batch with its padding

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width]"""


class Recipe(ABC):
    """What Hugging Face's Trainer needs to train a model, or how it is fitted without, and how the result is judged.

    A recipe has either `trainee` and `datasets`, or `fit`.
    `training` holds the preset's training settings with the user's changes; `data` is None for synthetic data.
    """

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        self.config = config
        self.training = training
        self.data = data

    def trainee(self, module: "nn.Module") -> "nn.Module":
        """`module` with its loss: called with a batch, it gives {"loss": scalar}."""
        raise NotImplementedError

    def datasets(self, lanes: int) -> tuple[Any, Any]:
        """Training and validation datasets; `lanes` is the number of rows a step takes over all devices."""
        raise NotImplementedError

    def parameter_groups(self, module: "nn.Module") -> list[dict[str, Any]] | None:
        """The optimizer's groups with their own `lr` and `weight_decay`; None, and the Trainer makes its usual two."""
        return None

    def judge(self, module: "nn.Module") -> Metrics | None:
        """What an epoch is judged by, with `loss` to be made small; None, and it is the loss of the trainee."""
        return None

    def report(self) -> Metrics:
        """What training shows about itself since the last report; told beside the loss."""
        return {}

    @abstractmethod
    def evaluate(self, module: "nn.Module") -> "Evaluation":
        """How good `module` is on the validation part."""

    @abstractmethod
    def sample_inputs(self) -> Tensors:
        """A few real validation inputs, kept with the checkpoint to prove parity on; and those to calibrate int8 on."""

    def fit(self) -> "nn.Module | None":
        """The trained module of a model that is not learned by gradients, and `config` as it was found to be best.

        None, and the Trainer trains a module of `config`.
        """
        return None

    def evaluate_settings(self) -> "Evaluation":
        """How good is what the settings alone describe; `InputError` from a model that needs a checkpoint for that."""
        raise InputError("expected --checkpoint DIR, found none")

    def collate(self, rows: Any) -> dict[str, Any]:
        """A batch from what the dataset gave; a dataset that gathers whole batches needs none."""
        return rows

    def frozen_inferences(self) -> Sequence[FrozenInference]:
        """What the frozen parts have to read once, before training; for `training.precompute`."""
        return ()

    def summary(self) -> list[str]:
        """Lines worth telling the user about the data: what was read, what was skipped and why."""
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics of a model beside those of baselines that need no model."""

    metrics: Metrics
    baselines: Mapping[str, Metrics]


def all_specs() -> dict[str, ModelSpec]:
    """Every model there is, by name."""
    packages = plugins.names("training.models")
    specs = [spec for package in packages for spec in plugins.load("training.models", package, "SPECS")]
    return {spec.name: spec for spec in specs}


def find_spec(name: str) -> ModelSpec:
    """The model of this name; `InputError` names the models there are."""
    specs = all_specs()
    if name not in specs:
        raise InputError(f"expected a model of {', '.join(sorted(specs))}; found '{name}'")
    return specs[name]


def override(defaults: Config, changes: Mapping[str, str]) -> Config:
    """`defaults` with the user's text values, each read as the type of the value it replaces."""
    result = dict(defaults)
    for name, text in changes.items():
        result[name] = _parse(name, text, defaults[name])
    return result


def _parse(name: str, text: str, default: Any) -> Any:
    kind = type(default)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError("not finite")
        return value
    except (ValueError, KeyError) as error:
        raise InputError(f"--set {name}: expected {kind.__name__} such as {default}, found '{text}'") from error
