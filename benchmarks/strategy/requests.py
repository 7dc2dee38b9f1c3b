"""Measure time and quality of requests by precision: python -m benchmarks.strategy.requests

The held-out dialogues of a checkpoint are requests in this process, each different from the one before; the precisions
alternate.
"""

import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bench.statistics import percentile
from runtimes.cache.store import Store
from runtimes.errors import InputError
from runtimes.host.cli import command, parser, precision_argument, repository_argument, table
from runtimes.pipelines.strategy.cached import StrategyCascade
from training.checkpoint import Checkpoint
from training.models.strategy.data import Sample
from training.models.strategy.metrics import confusion, measure
from training.models.strategy.recipe import StrategyRecipe

Cascades = Mapping[str, StrategyCascade]


@command
def main(argv: list[str] | None = None) -> int:
    """Print the quality of the served parts on held-out dialogues, and p50 and p99 of a request."""
    arguments = _parser().parse_args(argv)
    checkpoint = Checkpoint.load(arguments.checkpoint)
    held_out = StrategyRecipe(checkpoint.config, checkpoint.training, arguments.data).samples[1]
    with ExitStack() as stack:
        cascades = {}
        for precision in arguments.precision or ["fp32"]:
            opened = StrategyCascade(arguments.repository, stack.enter_context(Store()), precision=precision)
            cascades[precision] = stack.enter_context(opened)
        # First, while the stores are empty: the other table has the same texts.
        latencies = latency_table(cascades, held_out, arguments.turns or [2, 5], arguments.calls)
        print(f"{quality_table(cascades, held_out)}\n\n{latencies}")
    return 0


def quality_table(cascades: Cascades, samples: Sequence[Sample]) -> str:
    """Metrics of each precision on these samples, with their recorded emotions."""
    rows, first = [], None
    for precision, cascade in cascades.items():
        labels = cascade.strategies
        answers = [cascade.answer([request_of(sample, sample.dialogue.emotion_logits)])[0] for sample in samples]
        predicted = np.array([labels.index(answer["label"]) for answer in answers])
        first = predicted if first is None else first
        found = measure(confusion([sample.label for sample in samples], predicted, len(labels)))
        weights_bytes = sum((cascade.graph.root / name).stat().st_size for name in cascade.graph.artifact.files)
        metrics = [f"{found[name]:.4f}" for name in ("macro_f1", "accuracy")]
        rows.append((precision, f"{weights_bytes / 1e6:.1f}", *metrics, f"{(predicted == first).mean():.3f}"))
    return table(["precision", "graph part, MB", "macro F1", "accuracy", "same label as first"], rows)


def latency_table(cascades: Cascades, samples: Sequence[Sample], sizes: Sequence[int], calls: int) -> str:
    """Milliseconds of a request with an empty store, and with all its texts in the store."""
    rows = []
    for turns in sizes:
        requests = [request_of(sample) for sample in samples if len(sample.dialogue.turns) == turns]
        if not requests:
            raise InputError(f"expected held-out dialogues of {turns} turns, found none")
        new_s = {precision: _seconds(cascade, requests) for precision, cascade in cascades.items()}
        known_s: dict[str, list[float]] = {precision: [] for precision in cascades}
        while len(next(iter(known_s.values()))) < calls:
            for precision, cascade in cascades.items():
                known_s[precision] += _seconds(cascade, requests)
        for precision in cascades:
            times = percentile(new_s[precision], 50), *(percentile(known_s[precision], p) for p in (50, 99))
            rows.append((turns, precision, *("-" if found is None else f"{found * 1e3:.2f}" for found in times)))
    return table(["turns", "precision", "new: p50 ms", "known: p50 ms", "known: p99 ms"], rows)


def request_of(sample: Sample, emotion_logits: np.ndarray | None = None) -> dict[str, Any]:
    """A sample as a request; without emotions, the classifier computes them."""
    turns = [{"speaker": turn.speaker, "text": turn.text, "strategy": turn.strategy} for turn in sample.dialogue.turns]
    edges = None if sample.dialogue.edges is None else [list(edge) for edge in sample.dialogue.edges]
    emotions = None if emotion_logits is None else emotion_logits.tolist()
    return {"turns": turns, "edges": edges, "emotion_logits": emotions}


def _seconds(cascade: StrategyCascade, requests: Sequence[Any]) -> list[float]:
    """The seconds of each request."""
    ticks = [time.perf_counter()]
    for request in requests:
        cascade.answer([request])
        ticks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(ticks)]


def _parser() -> Any:
    result = parser(
        "benchmarks.strategy.requests",
        __doc__.partition(":")[0] + ".",
        "--checkpoint checkpoints/strategy --data dialogues.jsonl",
        "--checkpoint checkpoints/strategy --data dialogues.jsonl --precision fp32,int8",
    )
    result.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    result.add_argument("--data", type=Path, required=True, help="data of the training")
    repository_argument(result)
    precision_argument(result, "precisions of all parts (default: fp32)")
    result.add_argument(
        "--turns", action="append", type=int, help="turns of the dialogues; repeat for several (default: 2 and 5)"
    )
    result.add_argument("--calls", type=int, default=1000, help="least number of calls of each (default: %(default)s)")
    return result


if __name__ == "__main__":
    sys.exit(main())
