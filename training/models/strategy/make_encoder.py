"""Make a small random encoder whose tokenizer is trained on the data: python -m training.models.strategy.make_encoder

Its vectors are random projections of the words in a text, for machines without network access.
"""

import sys
from pathlib import Path
from typing import Any

from runtimes.errors import InputError
from runtimes.host.cli import command, parser
from runtimes.pipelines.strategy.dialogue import STRATEGIES
from training.models._random_folder import size_arguments, write_folder
from training.models.strategy.data import read_samples
from training.random_init import SPECIAL, train_tokenizer

MAX_POSITIONS = 514
HEADS = 4


@command
def main(argv: list[str] | None = None) -> int:
    """Write a Hugging Face folder: XLM-R with random weights, and a byte-level BPE tokenizer."""
    arguments = _parser().parse_args(argv)
    if arguments.width < HEADS or arguments.width % HEADS:
        raise InputError(f"--width: expected a multiple of {HEADS}, found {arguments.width}")
    from training.models.strategy.frozen import PAIR, SINGLE

    samples = read_samples(arguments.data, arguments.labels, 1000)
    texts = sorted({turn.text for sample in samples for turn in sample.dialogue.turns})
    tokenizer = train_tokenizer(texts, arguments.vocabulary, SPECIAL, single=SINGLE, pair=PAIR, normalizer=_one_form())
    write_encoder(arguments.out, tokenizer, width=arguments.width, layers=arguments.layers, seed=arguments.seed)
    print(f"{arguments.out}: {tokenizer.get_vocab_size()} tokens from {len(texts)} turns, width {arguments.width}")
    return 0


def _one_form() -> Any:
    """NFKC and lower case, so that variants of a letter are one token."""
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])


def write_encoder(folder: Path, tokenizer: Any, *, width: int, layers: int, seed: int) -> None:
    """A Hugging Face folder with a random encoder."""

    def encoder() -> Any:
        from transformers import XLMRobertaConfig, XLMRobertaModel

        config = XLMRobertaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            intermediate_size=2 * width,
            max_position_embeddings=MAX_POSITIONS,
            type_vocab_size=1,
        )
        return XLMRobertaModel(config, add_pooling_layer=False)

    write_folder(folder, encoder, tokenizer, seed)


def _parser() -> Any:
    result = parser(
        "training.models.strategy.make_encoder",
        __doc__.partition(":")[0] + ".",
        "--data dialogues.jsonl --out encoders/small",
        "--data ESConv.json --out encoders/wide --width 512 --vocabulary 16000",
    )
    result.add_argument("--data", type=Path, required=True, help="file with dialogues")
    result.add_argument(
        "--labels", default="esconv", choices=STRATEGIES, help="label set of the file (default: %(default)s)"
    )
    size_arguments(result, "encoder", width=256)
    return result


if __name__ == "__main__":
    sys.exit(main())
