"""Measure the hallucination detector: python -m benchmarks.hallucination.bench WHAT

goals    fused, memory, cached and fitting, one after the other
fused    one ONNX graph that gives the scores, beside one that gives all attention and states for scoring outside
memory   peak memory over the length of the prompt, fused and with all attention kept
reading  answers a CPU minute by precision, batching and compilation
cached   requests to a published artifact, the first time and repeated
served   scores of synthetic answers by each published precision
fitting  the effect of selection, mutual information, an ensemble and the threshold on the AUC of a score log
"""

import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.hallucination.fit import bench_fitting
from benchmarks.hallucination.fused import bench_fused
from benchmarks.hallucination.memory import bench_memory, measure_memory
from benchmarks.hallucination.published import bench_cached, bench_served
from benchmarks.hallucination.reading import bench_reading
from runtimes.host.cli import command, parser, repository_argument


def bench_goals(arguments: Any) -> str:
    """The benchmarks with a goal, in one run."""
    goals = ("fused", "memory", "cached", "fitting")
    return "\n\n".join(f"{name}\n{BENCHES[name](arguments)}" for name in goals)


BENCHES = {
    "goals": bench_goals,
    "fused": bench_fused,
    "memory": bench_memory,
    "reading": bench_reading,
    "fitting": bench_fitting,
    "cached": bench_cached,
    "served": bench_served,
}


@command
def main(argv: list[str] | None = None) -> int:
    """Print one table."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    if arguments.one:
        print(measure_memory(arguments.one, arguments.tokens, arguments.rows))
    else:
        print(BENCHES[arguments.bench](arguments))
    return 0


def _parser() -> Any:
    result = parser(
        "benchmarks.hallucination.bench",
        __doc__.partition(":")[0] + ".",
        "fused --tokens 512 --rows 128",
        "fitting --scores llama2_7b_chunk_scores_b.json",
    )
    result.add_argument("bench", choices=BENCHES, help="what to measure")
    result.add_argument("--tokens", type=int, default=512, help="tokens of prompt and answer (default: %(default)s)")
    result.add_argument("--rows", type=int, default=128, help="tokens of the answer (default: %(default)s)")
    result.add_argument("--repeats", type=int, default=9, help="calls of each way (default: %(default)s)")
    result.add_argument("--answers", type=int, default=48, help="answers to read (default: %(default)s)")
    result.add_argument(
        "--longest-dense",
        type=int,
        default=4096,
        help="memory: longest input with all attention kept, in tokens (default: %(default)s)",
    )
    result.add_argument(
        "--one",
        choices=("chunk", "token", "dense"),
        help="memory: measure this way once, in this process (default: all, in processes)",
    )
    result.add_argument("--scores", type=Path, help="fitting: score log (default: none)")
    repository_argument(result, "cached and served: folder of published artifacts")
    return result


if __name__ == "__main__":
    sys.exit(main())
