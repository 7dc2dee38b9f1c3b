"""How long a request takes in process, by precision and number of turns.

python -m training.models.strategy.request_bench

Every dialogue is asked once with an empty store and then again and again with what is kept; precisions take turns.
"""

import itertools
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from runtimes.caching import Store
from runtimes.cascade import StrategyCascade
from runtimes.command import command, parser, table
from runtimes.errors import InputError
from runtimes.measure import percentile
from training.models.strategy.data import Sample, read_samples

DIALOGUES = 50


@command
def main(argv: list[str] | None = None) -> int:
    """Print p50 and p99 of answering real dialogues, each another than the one before."""
    arguments = _parser().parse_args(argv)
    arguments.precision, arguments.turns = arguments.precision or ["fp32"], arguments.turns or [2, 5]
    samples = read_samples(arguments.data, arguments.labels, max(arguments.turns))
    rows: list[Sequence[object]] = []
    with ExitStack() as stack:
        cascades = {}
        for precision in arguments.precision:
            opened = StrategyCascade(arguments.repository, stack.enter_context(Store()), precision=precision)
            cascades[precision] = stack.enter_context(opened)
        for turns in arguments.turns:
            requests = [request_of(sample) for sample in samples if len(sample.dialogue.turns) == turns][:DIALOGUES]
            if not requests:
                raise InputError(f"{arguments.data}: expected dialogues of {turns} turns, found none")
            cold_s = {precision: _seconds(cascade, requests) for precision, cascade in cascades.items()}
            warm_s: dict[str, list[float]] = {precision: [] for precision in cascades}
            while len(warm_s[arguments.precision[0]]) < arguments.calls:
                for precision, cascade in cascades.items():
                    warm_s[precision] += _seconds(cascade, requests)
            rows += [(turns, precision, *_times(cold_s[precision], warm_s[precision])) for precision in cascades]
    print(table(["turns", "precision", "new: p50 ms", "known: p50 ms", "known: p99 ms"], rows))
    return 0


def request_of(sample: Sample) -> dict[str, Any]:
    """A sample as a request that leaves emotions to the classifier."""
    turns = [{"speaker": turn.speaker, "text": turn.text, "strategy": turn.strategy} for turn in sample.dialogue.turns]
    return {"turns": turns, "edges": [list(edge) for edge in sample.dialogue.edges or ()]}


def _seconds(cascade: StrategyCascade, requests: Sequence[Any]) -> list[float]:
    """How long each request took."""
    ticks = [time.perf_counter()]
    for request in requests:
        cascade.answer([request])
        ticks.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(ticks)]


def _times(cold_s: list[float], warm_s: list[float]) -> list[str]:
    found = (percentile(cold_s, 50), percentile(warm_s, 50), percentile(warm_s, 99))
    return ["-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in found]


def _parser() -> Any:
    result = parser(
        "training.models.strategy.request_bench",
        __doc__.partition(":")[0] + ".",
        "--data dialogues.jsonl",
        "--data dialogues.jsonl --precision fp32 --precision int8 --turns 2 --turns 5",
    )
    result.add_argument("--data", type=Path, required=True, help="file with dialogues")
    result.add_argument("--labels", default="esconv", help="label set of the file (default: esconv)")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where artifacts are")
    result.add_argument("--precision", action="append", help="of all three parts (default: fp32)")
    result.add_argument("--turns", action="append", type=int, help="length of the dialogues (default: 2 and 5)")
    result.add_argument("--calls", type=int, default=1000, help="calls of each, at least (default: 1000)")
    return result


if __name__ == "__main__":
    sys.exit(main())
