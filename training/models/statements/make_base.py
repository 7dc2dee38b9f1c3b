"""Make a small seeded base whose tokenizer is trained on the data: python -m training.models.statements.make_base

A Qwen2 with random weights: its states are random projections of the words in a text. It is the least that a base can
be, where none can be downloaded; what is learned, is learned by the adapters and the projection.
"""

import sys
from pathlib import Path
from typing import Any

from runtimes.command import command, parser
from runtimes.statements import read_papers
from training.models.statements.base import PAD, no_bars_in_a_log, train_tokenizer
from training.models.statements.data import flatten

MAX_POSITIONS = 1024
HEAD_WIDTH = 32


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder: Qwen2 with random weights, and a byte-level BPE tokenizer."""
    arguments = _parser().parse_args(argv)
    texts, _ = flatten(list(read_papers(arguments.data)))
    tokenizer = train_tokenizer(texts, arguments.vocabulary)
    write_base(arguments.out, tokenizer, width=arguments.width, layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.out}: a tokenizer from {len(texts)} statements, width {arguments.width}")
    return 0


def write_base(folder: Path, tokenizer_json: bytes, *, width: int, layers: int, seed: int) -> None:
    """Config, weights and tokenizer of a seeded base, in the files that Hugging Face reads."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Qwen2Config, Qwen2Model

    tokenizer = Tokenizer.from_buffer(tokenizer_json)
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
    no_bars_in_a_log()
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def _parser() -> Any:
    result = parser(
        "training.models.statements.make_base",
        __doc__.partition(":")[0] + ".",
        "--data stacks_train.jsonl --out bases/small",
        "--data stacks_train.jsonl --out bases/wide --width 1024 --vocabulary 16000",
    )
    result.add_argument("--data", type=Path, required=True, help="file with papers")
    result.add_argument("--out", type=Path, required=True, help="folder of the base")
    result.add_argument("--width", type=int, default=512, help="width of its states (default: 512)")
    result.add_argument("--layers", type=int, default=1, help="number of layers (default: 1)")
    result.add_argument("--vocabulary", type=int, default=8000, help="tokens at most (default: 8000)")
    result.add_argument("--seed", type=int, default=0, help="seed of its weights (default: 0)")
    return result


if __name__ == "__main__":
    sys.exit(main())
