"""Embedder: texts as vectors, by a published model; shared by the search command and the web page."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import ArtifactError, InputError
from runtimes.host.cli import artifact_arguments
from runtimes.pipeline import all_pipelines, open_pipeline
from runtimes.repository import find_artifact, published
from runtimes.runtime import open_runtime
from runtimes.tensors import require_finite


class Embedder:
    """Texts as vectors, by the newest published artifact of `model`. A context manager.

    Without a name, the only published model whose pipeline embeds.
    """

    def __init__(
        self, repository: Path, *, name: str = "", target: str = "onnx", precision: str = "fp32", threads: int = 2
    ) -> None:
        root = find_artifact(repository, name or find_model(repository, target, precision), target, precision)
        self._runtime = open_runtime(root, threads=threads)
        self._pipeline = open_pipeline(self._runtime.artifact, root)
        self.model = self._runtime.artifact.checkpoint

    def __enter__(self) -> "Embedder":
        self._runtime.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._runtime.close()

    def vectors(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, width], rows of length 1; `InputError` for a text that the model does not take."""
        outputs = self._runtime.fresh(self._pipeline.encode([{"text": text} for text in texts]))
        require_finite(outputs)
        (vectors,) = outputs.values()
        return np.asarray(vectors, np.float32)

    def refuse_another(self, name: object, model: str) -> None:
        """`ArtifactError` unless `model`, which filled the collection of this name, is the checkpoint used here."""
        if model != self.model:
            raise ArtifactError(
                f"{name}: holds the vectors of another model: expected checkpoint {self.model[:12]}…, found "
                f"{model[:12]}…; publish that checkpoint, or precompute the collection again with this one"
            )


def find_model(repository: Path, target: str, precision: str) -> str:
    """The only model with such an artifact whose pipeline embeds; `InputError` where there is none or a choice."""
    pipelines = {name for name, pipeline in all_pipelines().items() if pipeline.embeds}
    artifacts = map(Artifact.load, published(repository))
    found = sorted(
        each.model for each in artifacts if (each.target, each.precision) == (target, precision)
        and each.pipeline in pipelines
    )  # fmt: skip
    if not found:
        raise InputError(
            f"expected a published model that embeds texts in {repository}, for target {target} and {precision}, "
            f"found none; publish one: python -m export.all MODEL --target {target}"
        )
    if len(found) > 1:
        raise InputError(f"expected one model that embeds texts, found {', '.join(found)}; choose one with --embedder")
    return found[0]


def open_embedder(arguments: argparse.Namespace) -> Embedder:
    """The embedder that the options of `embedder_arguments` name."""
    return Embedder(
        arguments.repository,
        name=arguments.embedder,
        target=arguments.target,
        precision=arguments.precision,
        threads=arguments.threads,
    )


def embedder_arguments(to: argparse.ArgumentParser) -> None:
    """The options that choose the artifact that embeds a text."""
    to.add_argument(
        "--embedder", default="", metavar="MODEL", help="model that embeds the text (default: the only published one)"
    )
    artifact_arguments(to)
    to.add_argument("--threads", type=int, default=2, help="threads of a search (default: %(default)s)")
