"""Make a small seeded encoder whose tokenizer is trained on the data: python -m training.models.strategy.make_encoder

Its vectors are random projections of the words in a text: the least an encoder can give, without a network to
download a better one from.
"""

import sys
from pathlib import Path
from typing import Any

from runtimes.command import command, parser
from runtimes.dialogue import STRATEGIES
from runtimes.errors import InputError, require
from training.models.strategy.data import read_samples
from training.models.strategy.frozen import SPECIAL

MAX_POSITIONS = 514
HEADS = 4


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder: XLM-R with random weights, and a byte-level BPE tokenizer."""
    arguments = _parser().parse_args(argv)
    if arguments.width < HEADS or arguments.width % HEADS:
        raise InputError(f"--width: expected a multiple of {HEADS}, found {arguments.width}")
    samples = read_samples(arguments.data, arguments.labels, 1000)
    texts = sorted({turn.text for sample in samples for turn in sample.dialogue.turns})
    tokenizer = train_tokenizer(texts, arguments.vocabulary)
    write_encoder(arguments.out, tokenizer, width=arguments.width, layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens from {len(texts)} turns, width {arguments.width}")
    return 0


def train_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """A byte-level BPE tokenizer with the special tokens of XLM-R."""
    tokenizers = require("tokenizers", extra="strategy")
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [("<s>", SPECIAL.index("<s>")), ("</s>", SPECIAL.index("</s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer


def write_encoder(folder: Path, tokenizer: Any, *, width: int, layers: int, seed: int) -> None:
    """Config, weights and tokenizer of a seeded encoder, in the files that Hugging Face reads."""
    import torch
    from transformers import XLMRobertaConfig, XLMRobertaModel

    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        intermediate_size=2 * width,
        max_position_embeddings=MAX_POSITIONS,
        type_vocab_size=1,
    )
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def _parser() -> Any:
    result = parser(
        "training.models.strategy.make_encoder",
        __doc__.partition(":")[0] + ".",
        "--data dialogues.jsonl --out encoders/small",
        "--data ESConv.json --out encoders/wide --width 512 --vocabulary 16000",
    )
    result.add_argument("--data", type=Path, required=True, help="file with dialogues")
    result.add_argument(
        "--labels", default="esconv", choices=STRATEGIES, help="label set of the file (default: esconv)"
    )
    result.add_argument("--out", type=Path, required=True, help="folder of the encoder")
    result.add_argument("--width", type=int, default=256, help="width of its vectors (default: 256)")
    result.add_argument("--layers", type=int, default=1, help="number of layers (default: 1)")
    result.add_argument("--vocabulary", type=int, default=8000, help="tokens at most (default: 8000)")
    result.add_argument("--seed", type=int, default=0, help="seed of its weights (default: 0)")
    return result


if __name__ == "__main__":
    sys.exit(main())
