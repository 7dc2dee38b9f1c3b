"""Make a small seeded base whose tokenizer is trained on the data: python -m training.models.statements.make_base

A Qwen2 with random weights: its states are random projections of the words in a text. It is the least that a base can
be, where none can be downloaded; what is learned, is learned by the adapters and the projection.
"""

import sys
from pathlib import Path
from typing import Any

from runtimes.command import command, parser
from runtimes.statements import read_papers
from training.models.statements.base import PAD, statement_tokenizer
from training.models.statements.data import flatten
from training.seeded import add_sizes, write_folder

MAX_POSITIONS = 1024
HEAD_WIDTH = 32


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder: Qwen2 with random weights, and a byte-level BPE tokenizer."""
    arguments = _parser().parse_args(argv)
    texts, _ = flatten(list(read_papers(arguments.data)))
    tokenizer = statement_tokenizer(texts, arguments.vocabulary)
    write_base(arguments.out, tokenizer, width=arguments.width, layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.out}: a tokenizer from {len(texts)} statements, width {arguments.width}")
    return 0


def write_base(folder: Path, tokenizer: Any, *, width: int, layers: int, seed: int) -> None:
    """A Hugging Face folder with a seeded base."""
    import torch
    from transformers import Qwen2Config, Qwen2Model

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_WIDTH,  # type: ignore[call-arg]  # read by the model, not declared by its config
        intermediate_size=width // 4,
        max_position_embeddings=MAX_POSITIONS,
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = Qwen2Model(config)
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
    return result


if __name__ == "__main__":
    sys.exit(main())
