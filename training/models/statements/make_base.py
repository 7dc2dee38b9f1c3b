"""Make a small random base whose tokenizer is trained on the data: python -m training.models.statements.make_base

A Qwen2 with random weights, for machines without network access: its states are random projections of the words in a
text, and only the adapters and the projection are trained.
"""

import sys
from pathlib import Path
from typing import Any

from runtimes.host.cli import command, parser
from runtimes.search.papers import read_papers
from training.models._random_folder import size_arguments, write_folder
from training.models.statements.settings import GEOMETRIES
from training.models.statements.synthetic import flatten
from training.models.statements.tokenizer import PAD, statement_tokenizer
from training.random_init import PREFIX, geometry

MAX_POSITIONS = 1024
HEAD_WIDTH = 32


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder: Qwen2 with random weights, and a byte-level BPE tokenizer."""
    arguments = _parser().parse_args(argv)
    texts, _ = flatten(list(read_papers(arguments.data)))
    tokenizer = statement_tokenizer(texts, arguments.vocabulary)
    sizes = geometry(f"{PREFIX}{arguments.geometry}", GEOMETRIES) if arguments.geometry else small(arguments)
    write_base(arguments.out, tokenizer, sizes, arguments.seed)
    print(f"{arguments.out}: a tokenizer from {len(texts)} statements, width {sizes['hidden_size']}")
    return 0


def small(arguments: Any) -> dict[str, Any]:
    """Narrow heads and a narrow feed-forward part, so that random layers do not drown the words."""
    return {
        "hidden_size": arguments.width,
        "num_hidden_layers": arguments.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_WIDTH,
        "intermediate_size": arguments.width // 4,
        "max_position_embeddings": MAX_POSITIONS,
    }


def write_base(folder: Path, tokenizer: Any, sizes: dict[str, Any], seed: int) -> None:
    """A Hugging Face folder with a random base of these sizes."""

    def base() -> Any:
        import torch
        from transformers import Qwen2Config, Qwen2Model

        own = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": tokenizer.token_to_id(PAD)}
        model = Qwen2Model(Qwen2Config(**{**sizes, **own}))
        # At Qwen2's own 0.02 the random layers drown the word; at 1 a state depends on its word first.
        torch.nn.init.normal_(model.embed_tokens.weight)
        return model

    write_folder(folder, base, tokenizer, seed)


def _parser() -> Any:
    result = parser(
        "training.models.statements.make_base",
        __doc__.partition(":")[0] + ".",
        "--data stacks_train.jsonl --out bases/small",
        "--data stacks_train.jsonl --out bases/wide --width 1024 --vocabulary 16000",
    )
    result.add_argument("--data", type=Path, required=True, help="JSON-lines file with papers")
    size_arguments(result, "base", width=512)
    result.add_argument(
        "--geometry",
        choices=GEOMETRIES,
        help="sizes of a published model for --width, --layers (default: none)",
    )
    return result


if __name__ == "__main__":
    sys.exit(main())
