"""What length buckets save beside padding everything: python -m training.models.statements.padding_bench

Both read the same statements in turns, with the same model, tokenizer and thread; CPU time is what is compared.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from runtimes.command import command, parser, table
from runtimes.statements import read_papers
from training.checkpoint import Checkpoint
from training.models.statements.data import flatten
from training.spec import find_spec

ROWS = 8  # of a batch that is padded to the longest input


@command
def main(argv: list[str] | None = None) -> int:
    """Print statements a second for each way, and the median of their ratios."""
    import torch

    from training.models.statements.embedding import Embedder, open_embedder

    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    checkpoint = Checkpoint.load(arguments.checkpoint)
    bucketed = open_embedder(checkpoint, find_spec("statements"), device="cpu")
    texts, _ = flatten(list(read_papers(arguments.data, arguments.statements)))
    longest = checkpoint.config["max_tokens"]
    lengths = bucketed.tokens.lengths(texts)

    class Padded(Embedder):
        """Batches in the order of the file, each padded to the longest input there is."""

        def embed(self, texts: Any) -> np.ndarray:
            rows = [np.pad(row, (0, longest - len(row))) for row in self.tokens.rows(texts)]
            return np.concatenate([self._vectors(rows[i : i + ROWS]) for i in range(0, len(rows), ROWS)])

    padded = Padded(bucketed.module, bucketed.tokens, device="cpu")
    with torch.inference_mode():
        seconds = [(_cpu_s(bucketed.embed, texts), _cpu_s(padded.embed, texts)) for _ in range(arguments.rounds)]
    print(f"{len(texts)} statements, {np.mean(lengths):.1f} tokens on average, {longest} at most")
    rows = [
        (name, f"{len(texts) / median(column):.1f}")
        for name, column in zip(("length buckets", f"padded to {longest}"), zip(*seconds, strict=True), strict=True)
    ]
    print(table(["batches", "statements/s"], rows))
    print(f"median of the ratios: {median(slow / fast for fast, slow in seconds):.2f}")
    return 0


def _cpu_s(embed: Callable[[Any], Any], texts: list[str]) -> float:
    started = time.process_time()
    embed(texts)
    return time.process_time() - started


def _parser() -> Any:
    result = parser(
        "training.models.statements.padding_bench",
        __doc__.partition(":")[0] + ".",
        "--checkpoint checkpoints/statements --data stacks_valid.jsonl",
        "--checkpoint checkpoints/statements --data stacks_valid.jsonl --statements 1462 --rounds 5",
    )
    result.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    result.add_argument("--data", type=Path, required=True, help="file with papers")
    result.add_argument("--statements", type=int, default=1000, help="how many to read (default: 1000)")
    result.add_argument("--rounds", type=int, default=3, help="how often each way has its turn (default: 3)")
    return result


if __name__ == "__main__":
    sys.exit(main())
