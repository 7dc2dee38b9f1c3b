"""Hugging Face folders with a random model and a tokenizer trained on the data, for machines without network access."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_folder(folder: Path, make: Callable[[], Any], tokenizer: Any, seed: int) -> None:
    """Config, weights and tokenizer in the files that Hugging Face reads; the weights are those of this seed."""
    import torch

    from training.frozen import no_bars_in_a_log

    no_bars_in_a_log()
    torch.manual_seed(seed)
    make().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def size_arguments(to: argparse.ArgumentParser, made: str, *, width: int) -> None:
    """--out, --width, --layers, --vocabulary, --seed."""
    to.add_argument("--out", type=Path, required=True, help=f"folder of the {made}")
    to.add_argument("--width", type=int, default=width, help="width of its states (default: %(default)s)")
    to.add_argument("--layers", type=int, default=1, help="number of layers (default: %(default)s)")
    to.add_argument("--vocabulary", type=int, default=8000, help="largest number of tokens (default: %(default)s)")
    to.add_argument("--seed", type=int, default=0, help="seed of its weights (default: %(default)s)")
