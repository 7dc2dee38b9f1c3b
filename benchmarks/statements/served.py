"""Measure retrieval by the published artifacts of statements: python -m benchmarks.statements.served

Every held-out statement goes through the pipeline and the engine of each artifact, with one thread, in batches of
similar length.
"""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import Artifact
from runtimes.errors import InputError
from runtimes.host.cli import command, existing_folder, parser, repository_argument, table
from runtimes.pipeline import open_pipeline
from runtimes.repository import published
from runtimes.runtime import open_runtime
from runtimes.search.papers import read_papers
from training.models.statements.metrics import cosine, measure
from training.models.statements.spec import same_neighbours
from training.models.statements.synthetic import flatten

BATCH_ROWS = 8


@command
def main(argv: list[str] | None = None) -> int:
    """Print for each artifact its retrieval metrics, its likeness to the first, and its speed."""
    import torch

    arguments = _parser().parse_args(argv)
    texts, papers = flatten(list(read_papers(arguments.data)))
    roots = [root for root in published(existing_folder(arguments.repository, "published artifacts")) if _runs(root)]
    if not roots:
        raise InputError(f"expected artifacts of statements in {arguments.repository}, found none; run export.all")
    roots.sort(key=lambda root: Artifact.load(root).precision != "fp32")
    first: Any = None
    rows = []
    for root in roots:
        started = time.process_time()
        vectors = embed(root, texts)
        seconds = time.process_time() - started
        first = vectors if first is None else first
        found = measure(papers, cosine(torch.from_numpy(vectors)))
        top10, _ = same_neighbours(vectors, first)
        likeness = [f"{value:.5f}" for value in ((vectors * first).sum(1).min(), top10)]
        name = Artifact.load(root).name
        metrics = [f"{found[key]:.4f}" for key in ("mrr", "map", "p@1")]
        rows.append((name, *metrics, *likeness, f"{len(texts) / seconds:.0f}"))
    print(table(["artifact", "mrr", "map", "p@1", "least cosine", "top-10 overlap", "statements/CPU s"], rows))
    return 0


def embed(root: Path, texts: list[str]) -> np.ndarray:
    """float32 [texts, width] by the artifact in `root`."""
    found: list[Any] = [None] * len(texts)
    with open_runtime(root) as runtime:
        pipeline = open_pipeline(runtime.artifact, root)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), BATCH_ROWS):
            batch = order[start : start + BATCH_ROWS]
            (vectors,) = runtime.fresh(pipeline.encode([{"text": texts[i]} for i in batch])).values()
            for i, vector in zip(batch, vectors, strict=True):
                found[i] = vector
    return np.stack(found)


def _runs(root: Path) -> bool:
    artifact = Artifact.load(root)
    return artifact.model == "statements" and artifact.facts.ran


def _parser() -> Any:
    result = parser(
        "benchmarks.statements.served",
        __doc__.partition(":")[0] + ".",
        "--data stacks_valid.jsonl",
        "--data stacks_valid.jsonl --repository model_repository",
    )
    result.add_argument("--data", type=Path, required=True, help="file with papers")
    repository_argument(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
