"""Published artifacts: the time of requests, first and repeated, and the scores of each precision."""

from typing import Any

import numpy as np

from benchmarks.process_cost import cpu_s
from runtimes.artifact import artifact_name
from runtimes.cache.store import Store
from runtimes.host.cli import table
from runtimes.pipeline import open_pipeline
from runtimes.pipelines.hallucination.detector import DetectorCache
from runtimes.repository import find
from runtimes.runtime import open_runtime
from training.models.hallucination.data import synthetic_examples
from training.models.hallucination.metrics import auc

REPEATED = 20  # times that a request is repeated


def bench_cached(arguments: Any) -> str:
    """CPU milliseconds of requests to the published artifact, the first time and repeated."""
    rows = []
    with Store() as store, DetectorCache(arguments.repository, store) as cache:
        for sentences in (1, 2, 4, 10):
            cold: list[float] = []
            warm: list[float] = []
            for i in range(arguments.repeats):
                request = {
                    "prompt": f"Note {i}. " + "The bridge was opened in 1932. " * sentences,
                    "answer": "It was red.",
                }
                for times in (cold, *(warm,) * REPEATED):
                    times.append(cpu_s(lambda request=request: cache.answer([request])))  # type: ignore[misc]
            medians = [1e3 * float(np.median(times)) for times in (cold, warm)]
            rows.append((len(request["prompt"]), *(f"{ms:.3f}" for ms in medians), f"{medians[0] / medians[1]:.0f}"))
    return table(["characters of prompt", "first, CPU ms", "again, CPU ms", "ratio"], rows)


def bench_served(arguments: Any) -> str:
    """Scores of synthetic answers by each published precision, beside fp32."""
    examples = synthetic_examples(77, arguments.answers)
    labels = np.array([int(bool(example.hallucinated)) for example in examples])
    rows, exact = [], np.empty(0)
    for precision in ("fp32", "int8", "int8_dynamic"):
        root = find(arguments.repository, artifact_name("hallucination", "onnx", precision))
        with open_runtime(root) as runtime:
            pipeline = open_pipeline(runtime.artifact, root)
            printed = [pipeline.decode(runtime.fresh(pipeline.encode([example.request])))[0] for example in examples]
        scores = np.array([answer["response_score"] for answer in printed])
        exact = scores if not len(exact) else exact
        threshold = printed[0]["threshold"]
        same = np.mean((scores >= threshold) == (exact >= threshold))
        moved = np.abs(scores - exact)
        rows.append(
            (precision, f"{auc(labels, scores):.4f}", f"{same:.3f}", f"{np.median(moved):.4f}", f"{moved.max():.3f}")
        )
    return table(["precision", "AUC", "same label", "score moves (median)", "(most)"], rows)
