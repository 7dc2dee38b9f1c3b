"""Measure batches by length against padding to the longest: python -m benchmarks.statements.padding

Both embed the same statements in alternating rounds, with the same model, tokenizer and thread, and are compared by CPU
time.
"""

import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.process_cost import cpu_s
from runtimes.cache.store import buckets
from runtimes.errors import InputError
from runtimes.host.cli import command, parser, table
from runtimes.search.papers import read_papers
from runtimes.text_pipeline import Tokens
from training.checkpoint import Checkpoint
from training.models.statements.synthetic import flatten
from training.spec import find_spec


@command
def main(argv: list[str] | None = None) -> int:
    """Print statements a second for each way, the tokens it computes, and the median of the ratios of their times."""
    import torch

    from training.models.statements.embedding import Embedder

    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    bucketed, longest = _embedder(arguments)
    texts, _ = flatten(list(read_papers(arguments.data)))
    texts = texts[:: max(1, len(texts) // arguments.statements)]
    lengths = bucketed.tokens.lengths(texts)

    class Padded(Embedder):
        """Batches in the order of the file, each padded to the longest input, as large as a bucket."""

        def embed(self, texts: Any) -> np.ndarray:
            rows = [np.pad(row, (0, longest - len(row))) for row in self.tokens.rows(texts)]
            count = max(1, self.padded_size // longest)
            return np.concatenate([self._vectors(rows[i : i + count]) for i in range(0, len(rows), count)])

    padded = Padded(bucketed.module, bucketed.tokens, device="cpu")
    with torch.inference_mode():
        seconds = [
            (cpu_s(lambda: bucketed.embed(texts)), cpu_s(lambda: padded.embed(texts))) for _ in range(arguments.rounds)
        ]
    computed = sum(len(batch) * max(batch) for batch in buckets(lengths, lengths, bucketed.padded_size))
    print(f"{len(texts)} statements, {np.mean(lengths):.1f} tokens on average, {longest} at most")
    rows = [
        (name, tokens, f"{len(texts) / median(column):.1f}")
        for name, tokens, column in zip(
            ("length buckets", f"padded to {longest}"),
            (computed, longest * len(texts)),
            zip(*seconds, strict=True),
            strict=True,
        )
    ]
    print(table(["batches", "tokens computed", "statements/CPU s"], rows))
    print(f"of the tokens in buckets {1 - sum(lengths) / computed:.1%} are padding")
    print(f"tokens saved: {longest * len(texts) / computed:.2f} times")
    print(f"median of the ratios of time: {median(slow / fast for fast, slow in seconds):.2f}")
    return 0


def _embedder(arguments: Any) -> tuple[Any, int]:
    """(embedder, longest input) of a checkpoint, or of an untrained model: the time does not depend on the weights."""
    from training.models.statements.embedding import Embedder, open_embedder

    spec = find_spec("statements")
    if arguments.checkpoint:
        checkpoint = Checkpoint.load(arguments.checkpoint)
        return open_embedder(checkpoint, spec, device="cpu"), checkpoint.config["max_tokens"]
    if not arguments.base:
        raise InputError("expected --checkpoint DIR or --base SOURCE, found neither; name one")
    config = {**spec.preset("tiny"), "base": arguments.base}
    tokens = Tokens(spec.interface.assets(config)["tokenizer.json"], config["max_tokens"], keep="first")
    module = spec.interface.part(spec.interface.build(config).eval())
    return Embedder(module, tokens, device="cpu"), config["max_tokens"]


def _parser() -> Any:
    result = parser(
        "benchmarks.statements.padding",
        __doc__.partition(":")[0] + ".",
        "--checkpoint checkpoints/statements --data stacks_valid.jsonl",
        "--base bases/base --data stacks_valid.jsonl --statements 200 --rounds 5",
    )
    result.add_argument("--checkpoint", type=Path, help="folder of the checkpoint (default: none)")
    result.add_argument("--base", help="a base with random weights in place of a checkpoint (default: none)")
    result.add_argument("--data", type=Path, required=True, help="file with papers")
    result.add_argument(
        "--statements",
        type=int,
        default=1000,
        help="approximate number of statements, spread over the file (default: 1000)",
    )
    result.add_argument("--rounds", type=int, default=3, help="rounds of each way (default: %(default)s)")
    return result


if __name__ == "__main__":
    sys.exit(main())
