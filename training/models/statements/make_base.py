"""Make a small seeded base whose tokenizer is trained on the data: python -m training.models.statements.make_base

A Qwen2 with random weights: its states are random projections of the words in a text. It is the least that a base can
be, where none can be downloaded; what is learned, is learned by the adapters and the projection.
"""

import sys
from pathlib import Path
from typing import Any

from runtimes.host.cli import command, parser
from runtimes.search.papers import read_papers
from training.models.statements.base import GEOMETRIES, PAD, statement_tokenizer
from training.models.statements.data import flatten
from training.random_init import SEEDED, add_sizes, geometry, write_folder

MAX_POSITIONS = 1024
HEAD_WIDTH = 32


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder: Qwen2 with random weights, and a byte-level BPE tokenizer."""
    arguments = _parser().parse_args(argv)
    texts, _ = flatten(list(read_papers(arguments.data)))
    tokenizer = statement_tokenizer(texts, arguments.vocabulary)
    sizes = geometry(f"{SEEDED}{arguments.geometry}", GEOMETRIES) if arguments.geometry else small(arguments)
    write_base(arguments.out, tokenizer, sizes, arguments.seed)
    print(f"{arguments.out}: a tokenizer from {len(texts)} statements, width {sizes['hidden_size']}")
    return 0


def small(arguments: Any) -> dict[str, Any]:
    """Narrow heads and a narrow feed-forward part: what is random in a layer shall not drown the words."""
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
    """A Hugging Face folder with a seeded base of these sizes."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(seed)
    own = {"vocab_size": tokenizer.get_vocab_size(), "pad_token_id": tokenizer.token_to_id(PAD)}
    model = Qwen2Model(Qwen2Config(**{**sizes, **own}))
    # At Qwen2's own 0.02 a layer of random weights drowns the word; at 1 it is the word that a state speaks of.
    torch.nn.init.normal_(model.embed_tokens.weight)
    write_folder(folder, model, tokenizer)


def _parser() -> Any:
    result = parser(
        "training.models.statements.make_base",
        __doc__.partition(":")[0] + ".",
        "--data stacks_train.jsonl --out bases/small",
        "--data stacks_train.jsonl --out bases/wide --width 1024 --vocabulary 16000",
    )
    result.add_argument("--data", type=Path, required=True, help="file with papers")
    add_sizes(result, "base", width=512)
    result.add_argument("--geometry", choices=GEOMETRIES, help="sizes of a published kind in place of width and layers")
    return result


if __name__ == "__main__":
    sys.exit(main())
