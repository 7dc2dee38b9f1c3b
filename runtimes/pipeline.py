"""Pipeline: a request becomes tensors, tensors become an answer. Written once, used in training, serving and Triton."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtimes import plugins
from runtimes.artifact import ASSETS, Artifact


class Pipeline(ABC):
    """Encodes requests and decodes outputs for one model. JSON objects in, JSON objects out.

    `config` is the checkpoint's config; `assets` is the folder with files such as a tokenizer, if the model has any.
    """

    cascade: ClassVar[Callable[..., Any] | None] = None  # opens the model's parts around a store, if it has any

    def __init__(self, config: Mapping[str, Any], assets: Path) -> None:
        self.config = config
        self.assets = assets

    @abstractmethod
    def encode(self, requests: Sequence[Any]) -> dict[str, np.ndarray]:
        """Tensors for a batch of requests, one row each. `InputError` says which request is wrong and how."""

    @abstractmethod
    def decode(self, outputs: Mapping[str, np.ndarray]) -> list[Any]:
        """One JSON-serialisable answer per row of the outputs."""

    @abstractmethod
    def example(self) -> Any:
        """A valid request, short enough to read."""


def open_pipeline(artifact: Artifact, folder: Path) -> Pipeline:
    """The pipeline of an artifact that lies in `folder`."""
    pipeline: type[Pipeline] = plugins.load("runtimes.pipelines", artifact.pipeline, "PIPELINE")
    return pipeline(artifact.config, folder / ASSETS)
