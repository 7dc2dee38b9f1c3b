"""What an H-Net is for, in process: score a text, divide it, go on with it: python -m training.models.hnet.inference"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtimes.errors import InputError
from runtimes.host.cli import command, parser
from runtimes.pipelines.hnet.byte_text import check_text, padded_rows, segments
from runtimes.pipelines.hnet.generation import GenerationRequest, Writing
from training.checkpoint import Checkpoint, restore
from training.models.hnet.spec import SPECS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from training.models.hnet.module import HNetForCausalLM

BYTES_MAX = 65_536  # of a text that is read at once
Text = str | bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next byte is chosen: the likeliest at temperature 0, else drawn among the `top_k` likeliest (0: all)."""

    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature: expected a number of 0 or more, found {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k: expected 0 or more, found {self.top_k}")


def score(module: "HNetForCausalLM", texts: Sequence[Text]) -> list[dict[str, float]]:
    """The information of every text in `bits`, its `bytes`, and `bits_per_byte`."""
    from torch.nn import functional as F

    from training.models.hnet.metrics import NATS_A_BIT

    rows, ids, logits, _ = _read(module, texts)
    nats = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    result = []
    for row, data in enumerate(rows):
        bits = float(nats[row, : len(data)].double().sum()) / NATS_A_BIT
        result.append({"bits": bits, "bytes": len(data), "bits_per_byte": bits / len(data)})
    return result


def segment(module: "HNetForCausalLM", texts: Sequence[Text]) -> list[list[list[dict[str, Any]]]]:
    """The segments of every text at every stage, the shortest first."""
    rows, _, _, boundary = _read(module, texts)
    return [
        [list(segments(data, boundary[row, 1 : len(data) + 1, stage])) for stage in range(boundary.shape[-1])]
        for row, data in enumerate(rows)
    ]


def _read(module: "HNetForCausalLM", texts: Sequence[Text]) -> "tuple[list[bytes], Tensor, Tensor, np.ndarray]":
    """(texts as bytes, byte_ids [B, T] from BOS on, logits [B, T, 256], boundaries bool [B, T, stages])."""
    import torch

    if not texts:
        raise InputError("expected at least one text, found none")
    rows = [check_text(text, f"text {i}", BYTES_MAX) for i, text in enumerate(texts)]
    ids, lengths = (torch.from_numpy(array).to(_device(module)) for array in padded_rows(rows))
    with torch.inference_mode():
        logits, _, boundary = module(ids, lengths)
    return rows, ids, logits, boundary.cpu().numpy()


def generate(
    module: "HNetForCausalLM", prompts: Sequence[Text], max_bytes: int, sampling: Sampling | None = None
) -> Iterator[tuple[int, str]]:
    """(row, code point) as each is complete, until a row said BOS or no more fits into `max_bytes`; valid UTF-8.

    Every row reads its own prompt, which may be empty, and draws from its own random numbers: what it says does not
    hang on the rows beside it. A byte costs the same wherever it stands.
    """
    if max_bytes < 1:
        raise InputError(f"max_bytes: expected 1 or more, found {max_bytes}")
    sampling = sampling or Sampling()
    writings = []
    for row, prompt in enumerate(prompts):
        data = check_text(prompt, f"prompt {row}", BYTES_MAX, least=0)
        writings.append(Writing(GenerationRequest(prompt=data, max_bytes=max_bytes, **asdict(sampling)), row))
    return _generate(module, writings)


def _generate(module: "HNetForCausalLM", writings: list[Writing]) -> Iterator[tuple[int, str]]:
    import torch

    state = module.zero_state(len(writings))
    while writings:
        ids = torch.tensor([writing.next for writing in writings], device=_device(module))
        with torch.inference_mode():
            logits, _, _, state = module.step(ids, state)
        scores = logits.cpu().numpy()
        for writing, row_scores in zip(writings, scores, strict=True):
            if text := writing.take(row_scores):
                yield writing.row, text
        if any(writing.finish_reason for writing in writings):
            going = [i for i, writing in enumerate(writings) if not writing.finish_reason]
            writings = [writings[i] for i in going]
            state = {name: tensor[going] for name, tensor in state.items()}


def _device(module: "HNetForCausalLM") -> "torch.device":
    return module.embeddings.weight.device


def open_hnet(folder: Path) -> "HNetForCausalLM":
    """The H-Net of a checkpoint, in eval mode."""
    from training.models.hnet.module import HNetForCausalLM

    module = restore(Checkpoint.load(folder), SPECS[0])
    assert isinstance(module, HNetForCausalLM)
    return module


@command
def main(argv: list[str] | None = None) -> int:
    """Score, divide or go on with a text."""
    result = parser(
        "training.models.hnet.inference",
        "Score a text, divide it into segments, or go on with it.",
        "segment --checkpoint checkpoints/hnet --text 'తెలుగు ఒక భాష.'",
        "generate --checkpoint checkpoints/hnet --text 'తెలుగు' --max-bytes 300 --temperature 0.8",
    )
    result.add_argument("act", choices=("score", "segment", "generate"))
    result.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    given = result.add_mutually_exclusive_group(required=True)
    given.add_argument("--text")
    given.add_argument("--file", type=Path, help="a file that holds the text")
    result.add_argument("--max-bytes", type=int, default=300, help="bytes to write at most (default: 300)")
    result.add_argument("--temperature", type=float, default=1.0, help="0 is the likeliest byte (default: 1)")
    result.add_argument("--top-k", type=int, default=0, help="among how many bytes to draw; 0 is all (default: 0)")
    result.add_argument("--seed", type=int, default=0)
    arguments = result.parse_args(argv)
    text: Text = arguments.text if arguments.file is None else arguments.file.read_bytes()
    module = open_hnet(arguments.checkpoint)
    if arguments.act == "score":
        print(json.dumps(score(module, [text])[0]))
    elif arguments.act == "segment":
        for stage in segment(module, [text])[0]:
            print("|".join(part["text"] for part in stage))
    else:
        sampling = Sampling(temperature=arguments.temperature, top_k=arguments.top_k, seed=arguments.seed)
        for _, code_point in generate(module, [text], arguments.max_bytes, sampling):
            print(code_point, end="", flush=True)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
