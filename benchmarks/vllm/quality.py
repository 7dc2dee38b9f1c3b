"""Measure the quality of a quantized decoder: python -m benchmarks.vllm.quality decoders/7m --train FILE --valid FILE

Perplexity and next-token agreement on held-out statements, with the values of the packed weights in float32; and the
bytes of the quantized layers. One row is a control: the zero points of AWQ are one too large.
"""

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, PreTrainedTokenizerFast

from export.hugging_face import store_as
from export.quantization.language_model import SCHEMES, bytes_of_bf16, quantize
from runtimes.host.cli import command, parser, table
from runtimes.host.output_capture import bars_on_a_terminal_only
from runtimes.search.papers import read_papers
from training.models.statements.synthetic import flatten

CONTROL = "w4a16_awq"
NIBBLES = np.arange(0, 32, 4, dtype=np.uint32)

Scores = tuple[np.ndarray, np.ndarray]  # log-probabilities of the tokens, the likeliest token in each place


@command
def main(argv: list[str] | None = None) -> int:
    """Print a table with a row for each precision."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.decoder)
    calibration = rows(tokenizer, arguments.train, arguments.samples, arguments.tokens)
    held_out = rows(tokenizer, arguments.valid, arguments.held_out, arguments.tokens)
    plain = AutoModelForCausalLM.from_pretrained(arguments.decoder, dtype=torch.float32).eval()
    own = score(plain, held_out)
    lines = [line("float32", own, own)]
    for name, folder, seconds in quantized(arguments, tokenizer, calibration):
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True), "dtype": torch.float32}
        with bars_on_a_terminal_only():
            model = AutoModelForCausalLM.from_pretrained(folder, **options).float().eval()
        lines.append(line(name, score(model, held_out), own, bytes_of_bf16(folder), seconds))
    print(f"{len(own[0])} held-out tokens; {sum(map(len, calibration))} to calibrate on")
    print(table(["precision", "bytes of bf16", "perplexity", "ratio", "next token", "mean shift", "seconds"], lines))
    return 0


def quantized(arguments: Any, tokenizer: Any, calibration: Sequence[np.ndarray]) -> Iterator[tuple[str, Path, float]]:
    """(precision, folder, seconds) of each quantized decoder, and of the control; a folder lives until the next."""
    for name, scheme in SCHEMES.items():
        if scheme.activations < 16:
            continue  # vLLM also rounds its activations, this script does not
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            started = time.perf_counter()
            with bars_on_a_terminal_only():
                model = AutoModelForCausalLM.from_pretrained(arguments.decoder, dtype=torch.float32).eval()
            quantize(model, tokenizer, calibration, scheme, folder)
            store_as(folder, torch.bfloat16)
            yield name, folder, time.perf_counter() - started
            if name == CONTROL:
                shift_zero_points(folder / "model.safetensors")
                yield f"{name}, zero points + 1", folder, 0.0


def rows(tokenizer: Any, path: Path, count: int, tokens: int) -> list[np.ndarray]:
    """`count` rows of `tokens` tokens from the start of a file of papers, its texts concatenated."""
    texts, _ = flatten(list(read_papers(path)))
    line = np.concatenate([[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts).input_ids]).astype(np.int64)
    return [line[start : start + tokens] for start in range(0, min(len(line) - tokens, count * tokens), tokens)]


def score(model: Any, texts: Sequence[np.ndarray]) -> Scores:
    scores, likeliest = [], []
    with torch.no_grad():
        for text in texts:
            ids = torch.from_numpy(text)[None]
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            scores.append(logprobs.gather(-1, ids[0, 1:, None])[:, 0].numpy())
            likeliest.append(logprobs.argmax(-1).numpy())
    return np.concatenate(scores), np.concatenate(likeliest)


def line(name: str, printed: Scores, own: Scores, size: float | None = None, seconds: float = 0.0) -> list[str]:
    perplexity, original = (float(np.exp(-scores.astype(float).mean())) for scores, _ in (printed, own))
    return [
        name,
        "-" if size is None else f"{size:.3f}",
        f"{perplexity:.2f}",
        f"{perplexity / original:.4f}",
        f"{(printed[1] == own[1]).mean():.3f}",
        f"{np.abs(printed[0] - own[0]).mean():.3f}",
        f"{seconds:.0f}",
    ]


def shift_zero_points(path: Path) -> None:
    """Every zero point of four bits is increased by one, up to 15."""
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith("zero_point"):
            parts = (tensor.numpy().view(np.uint32)[..., None] >> NIBBLES) & np.uint32(15)
            shifted = (np.minimum(parts + 1, 15).astype(np.uint32) << NIBBLES).sum(-1, dtype=np.uint32)
            tensors[name] = torch.from_numpy(shifted.view(np.int32))
    save_file(tensors, path, metadata={"format": "pt"})


def _parser() -> Any:
    result = parser(
        "benchmarks.vllm.quality",
        "Measures what quantizing costs a decoder.",
        "decoders/7m --train stacks_train.jsonl --valid stacks_valid.jsonl",
        "decoders/7m --train stacks_train.jsonl --valid stacks_valid.jsonl --held-out 16",
    )
    result.add_argument("decoder", type=Path, help="Hugging Face folder")
    result.add_argument("--train", type=Path, required=True, help="papers to calibrate on")
    result.add_argument("--valid", type=Path, required=True, help="papers to measure on")
    result.add_argument("--samples", type=int, default=128, help="rows to calibrate on (default: %(default)s)")
    result.add_argument("--held-out", type=int, default=64, help="rows to measure on (default: %(default)s)")
    result.add_argument("--tokens", type=int, default=128, help="tokens of a row (default: %(default)s)")
    return result


if __name__ == "__main__":
    sys.exit(main())
