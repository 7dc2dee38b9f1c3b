"""Find the statements of a collection that are closest to a text: python -m runtimes.search COLLECTION --text TEXT"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.approximate import Index
from runtimes.artifact import artifact_name
from runtimes.base import open_runtime
from runtimes.collection import Collection
from runtimes.command import command, parser
from runtimes.errors import ArtifactError, EngineError
from runtimes.nearest import top_k
from runtimes.pipeline import open_pipeline
from runtimes.repository import find

MODEL = "statements"
TEXT_CHARACTERS = 70  # of a statement, in the table


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


@command
def main(argv: list[str] | None = None) -> int:
    """Print the closest statements with their cosines, as a table or as JSON."""
    arguments = _parser().parse_args(argv)
    collection = Collection.open(arguments.collection)
    with open_embedder(arguments) as embedder:
        embedder.refuse_another(arguments.collection, collection.info.model)
        queries = embedder.vectors([arguments.text])
    if arguments.approximate:
        rows, scores = Index(collection).top_k(queries, arguments.k, threads=arguments.threads)
    else:
        rows, scores = top_k(collection.embeddings, queries, arguments.k, threads=arguments.threads)
    hits = [
        {"row": int(row), "score": round(float(score), 6), **asdict(collection.entry(int(row)))}
        for row, score in zip(rows[0], scores[0], strict=True)
    ]
    if arguments.json:
        print(json.dumps({"text": arguments.text, "hits": hits}, ensure_ascii=False))
        return 0
    for hit in hits:
        text = " ".join(hit["text"].split())
        print(f"{hit['score']:.3f}  {hit['row']:>7}  {hit['arxiv_id']}  {hit['type']}  {text[:TEXT_CHARACTERS]}")
    return 0


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


def _parser() -> Any:
    result = parser(
        "runtimes.search",
        __doc__.partition(":")[0] + ".",
        "collections/toy --text 'every affine scheme is quasi-compact'",
        "collections/toy --text 'a Noetherian ring' --k 100 --json",
    )
    result.add_argument("collection", type=Path, metavar="COLLECTION", help="folder of the collection")
    result.add_argument("--text", required=True, help="what to look for, with or without LaTeX")
    result.add_argument("--k", type=int, default=10, help="how many statements (default: 10)")
    result.add_argument("--approximate", action="store_true", help="by the index of runtimes.approximate")
    result.add_argument("--json", action="store_true", help="print JSON instead of a table")
    embedder_flags(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
