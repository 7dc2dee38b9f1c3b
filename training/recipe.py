"""Recipe: how a model is trained. Training: its settings by preset, and the experiments made with them."""

import argparse
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from runtimes.errors import InputError
from runtimes.host.cli import settings_argument, table
from runtimes.tensors import Tensors
from training.config import Config, Metrics
from training.frozen_store import FrozenInference

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Metrics of a model, and those of baselines by name."""

    metrics: Metrics
    baselines: Mapping[str, Metrics]

    def table(self) -> str:
        """Metrics in rows, the model and its baselines in columns."""
        names = list(self.baselines)
        rows = [
            (metric, f"{value:.4f}", *(_cell(self.baselines[name].get(metric)) for name in names))
            for metric, value in self.metrics.items()
        ]
        return table(["metric", "model", *names], rows)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


class Recipe(ABC):
    """The datasets and the loss for Hugging Face's Trainer, or a fit without it, and the evaluation of the result.

    A recipe has either `module_with_loss` and `datasets`, or `fit`.
    `training` holds the preset's training settings with the user's changes; `data` is None for synthetic data.
    """

    def __init__(self, config: Config, training: Config, data: Path | None) -> None:
        self.config = config
        self.training = training
        self.data = data

    def module_with_loss(self, module: "nn.Module") -> "nn.Module":
        """`module` with its loss: called with a batch, it returns {"loss": scalar}."""
        raise NotImplementedError

    def datasets(self, step_rows: int) -> tuple[Any, Any]:
        """Training and validation datasets; `step_rows` is the number of rows of a step over all devices."""
        raise NotImplementedError

    def parameter_groups(self, module: "nn.Module") -> list[dict[str, Any]] | None:
        """The optimizer's groups with their own `lr` and `weight_decay`; None for the Trainer's usual two."""
        return None

    def selection_metric(self, module: "nn.Module") -> Metrics | None:
        """Metrics after an epoch, of which the smallest `loss` selects the checkpoint; None for the validation loss."""
        return None

    def report(self) -> Metrics:
        """Metrics of the training batches since the last report; logged with the loss."""
        return {}

    @abstractmethod
    def evaluate(self, module: "nn.Module") -> Evaluation:
        """Metrics of `module` and of baselines on the validation part."""

    @abstractmethod
    def sample_inputs(self) -> Tensors:
        """A few real validation inputs, kept with the checkpoint for parity; and those to calibrate int8 on."""

    def fit(self) -> "nn.Module | None":
        """The trained module of a model that is not trained by gradients; `config` then holds the best settings found.

        None for a model that the Trainer trains.
        """
        return None

    def evaluate_settings(self) -> Evaluation:
        """Metrics of the model that the settings alone describe; `InputError` where a checkpoint is needed."""
        raise InputError("expected --checkpoint DIR, found none")

    def collate(self, rows: Any) -> dict[str, Any]:
        """A batch of the dataset's rows; a dataset that gathers whole batches needs none."""
        return rows

    def frozen_inferences(self) -> Sequence[FrozenInference]:
        """The texts of the data for each frozen part, which `training.precompute` runs once before training."""
        return ()

    def summary(self) -> list[str]:
        """Lines about the data: how much was read, and which files were skipped and why."""
        return []


class TextEmbedder(Protocol):
    """A model that embeds texts; made from (checkpoint, *, device, precision, padded_size)."""

    padded_size: int  # tokens of a batch with its padding

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width]"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """Experiments that are compared in one table and one plot.

    runs     the changed settings of each experiment, by name; from the config and the training settings they change
    columns  the metrics of the table
    plotted  the metrics of the two axes; a run or a baseline without the first is drawn as a line
    """

    runs: Callable[[Config, Config], Mapping[str, Mapping[str, str]]]
    columns: Sequence[str]
    plotted: tuple[str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """How a model is trained. Nothing in it decides the bytes of an artifact.

    recipe    the class of the recipe, imported when it is called
    settings  training settings by name of the preset
    implied   the training settings with those that follow from others, such as a profile's; those of the user win
    notes     the meaning of each setting, for --help
    renamed   the present name of a setting by its name in version 0.1, which is accepted
    sweep     the experiments of training.sweep, if there are any
    embedder  opens a checkpoint to embed whole collections, if the model does that
    """

    recipe: Callable[[], type[Recipe]]
    settings: Mapping[str, Config]
    implied: Callable[[Config, Config], Config] = lambda config, training: training
    notes: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    sweep: Sweep | None = None
    embedder: Callable[..., TextEmbedder] | None = None

    def __post_init__(self) -> None:
        if not self.settings:
            raise ValueError("training: expected settings for at least one preset, found none")


def data_arguments(to: argparse.ArgumentParser) -> None:
    """The arguments that describe a recipe: --preset, --data and --set."""
    to.add_argument("--preset", default="tiny", help="size of the model, tiny or full for most (default: %(default)s)")
    to.add_argument("--data", type=Path, help="file or folder with the model's data (default: synthetic data)")
    set_argument(to)


def set_argument(to: argparse.ArgumentParser) -> None:
    """--set, which changes a setting of the config or of training."""
    settings_argument(to, "change one setting, may be repeated (default: those of the preset)")
