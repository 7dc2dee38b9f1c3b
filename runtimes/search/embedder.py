"""Embedder: texts as vectors, by a published model; what a search and the web page share."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtimes.artifact import artifact_name
from runtimes.errors import ArtifactError, EngineError
from runtimes.pipeline import open_pipeline
from runtimes.repository import find
from runtimes.runtime import open_runtime

MODEL = "statements"


class Embedder:
    """Texts as vectors, by the newest published artifact of the statements model. A context manager."""

    def __init__(self, repository: Path, *, target: str = "onnx", precision: str = "fp32", threads: int = 2) -> None:
        root = find(repository, artifact_name(MODEL, target, precision))
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
        (vectors,) = outputs.values()
        if not np.isfinite(vectors).all():
            raise EngineError("expected finite vectors, found NaN or infinity; run export.verify")
        return np.asarray(vectors, np.float32)

    def refuse_another(self, name: object, model: str) -> None:
        """`ArtifactError` unless `model`, which filled the collection of this name, is the one that answers here."""
        if model != self.model:
            raise ArtifactError(
                f"{name}: holds the vectors of another model: expected checkpoint {self.model[:12]}…, found "
                f"{model[:12]}…; publish that checkpoint, or precompute the collection again with this one"
            )


def open_embedder(arguments: argparse.Namespace) -> Embedder:
    """The embedder that the flags of `embedder_flags` name."""
    return Embedder(
        arguments.repository, target=arguments.target, precision=arguments.precision, threads=arguments.threads
    )


def embedder_flags(to: argparse.ArgumentParser) -> None:
    """The options that choose the artifact by which a text is embedded."""
    to.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    to.add_argument("--target", default="onnx", help="target of the artifact (default: onnx)")
    to.add_argument("--precision", default="fp32", help="precision of the artifact (default: fp32)")
    to.add_argument("--threads", type=int, default=2, help="threads of a search (default: 2)")
