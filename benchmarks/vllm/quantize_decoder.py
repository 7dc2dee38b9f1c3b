"""Quantize the decoder of the benchmark of vLLM: python -m benchmarks.vllm.quantize_decoder decoders/90m

It runs the code of the target vllm, calibrated on the first statements of a file, cut to a length.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from export.hugging_face import store_as
from export.quantization.language_model import SCHEMES, bytes_of_bf16, quantize
from runtimes.host.cli import command, parser
from runtimes.search.papers import read_papers
from training.models.statements.synthetic import flatten


@command
def main(argv: list[str] | None = None) -> int:
    """Write the quantized decoder into a folder of its own."""
    arguments = _parser().parse_args(argv)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.decoder)
    model = AutoModelForCausalLM.from_pretrained(arguments.decoder, dtype=torch.float32).eval()
    texts, _ = flatten(list(read_papers(arguments.data)))
    rows = [np.array(tokenizer(text).input_ids[: arguments.tokens]) for text in texts[: arguments.samples]]
    arguments.out.mkdir(parents=True)
    quantize(model, tokenizer, rows, SCHEMES[arguments.scheme], arguments.out)
    store_as(arguments.out, torch.bfloat16)
    tokenizer.save_pretrained(arguments.out)
    print(f"{arguments.out}: {bytes_of_bf16(arguments.out):.3f} of the quantized layers' bytes in bfloat16")
    return 0


def _parser() -> Any:
    result = parser(
        "benchmarks.vllm.quantize_decoder",
        "Quantizes a decoder.",
        "decoders/90m --data stacks_train.jsonl --out decoders/90m_w4",
        "decoders/90m --data stacks_train.jsonl --out decoders/90m_w4_gptq --scheme w4a16_gptq",
    )
    result.add_argument("decoder", type=Path, help="Hugging Face folder")
    result.add_argument("--data", type=Path, required=True, help="file with papers to calibrate on")
    result.add_argument("--out", type=Path, required=True, help="folder of the quantized decoder")
    result.add_argument(
        "--scheme", choices=SCHEMES, default="w4a16_awq", help="quantization scheme (default: %(default)s)"
    )
    result.add_argument("--samples", type=int, default=64, help="statements to calibrate on (default: %(default)s)")
    result.add_argument("--tokens", type=int, default=128, help="tokens of a statement, at most (default: %(default)s)")
    return result


if __name__ == "__main__":
    sys.exit(main())
