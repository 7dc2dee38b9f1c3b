"""Measure the cache of keys in AARF's generation: python -m benchmarks.hallucination.generation

The same step of the same decoder, with the keys of every earlier token cached, and with none: then each token is
computed from the whole sequence.
"""

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.hallucination.bench_decoder import decoder_config
from runtimes.errors import EngineError
from runtimes.host.cli import command, parser, table
from runtimes.pipelines.hallucination.decoding import Generated, Generator, Mitigation
from training.config import Config
from training.models.hallucination import aarf_spec
from training.models.hallucination.aarf import MitigatedDecoder
from training.models.hallucination.module import ChunkDetector
from training.models.hallucination.settings import heads_of, layers_of

LENGTHS = (128, 512, 1024, 2048)
MAX_TOKENS = 4096
ALWAYS = Mitigation(tau=-1e9)


class Uncached(Generator):
    """A generator without a cache: each token is computed from the whole sequence."""

    def generate(self, ids: Any, prompt: tuple[int, int], **options: Any) -> Generated:
        result = Generated()
        for _ in range(options["max_new_tokens"]):
            printed = super().generate([*ids, *result.ids], prompt, **{**options, "max_new_tokens": 1})
            result.ids += printed.ids
            result.scores += printed.scores
            result.reweighted += printed.reweighted
        return result


@command
def main(argv: list[str] | None = None) -> int:
    """Print CPU milliseconds a token by length of the prompt, both ways alternating, scored and always reweighted."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    settings = generator_settings(decoder_config(MAX_TOKENS))
    ways = {"cached": Generator(**settings), "uncached": Uncached(**settings)}
    rows = []
    for length in LENGTHS:
        ids = (torch.arange(length) * 7 % 3000 + 4).tolist()
        found: dict[str, Generated] = {}
        milliseconds: dict[str, float] = {}
        for name, generator in ways.items():
            first_ms, _ = _generate(generator, ids, 1)
            all_ms, found[name] = _generate(generator, ids, 1 + arguments.tokens)
            milliseconds[name] = (all_ms - first_ms) / arguments.tokens
        if found["cached"].ids != found["uncached"].ids:
            raise EngineError("expected the same tokens both ways, found others; this is a fault of the cache")
        ratio = milliseconds["uncached"] / milliseconds["cached"]
        rows.append((length, *(f"{ms:.0f}" for ms in milliseconds.values()), f"{ratio:.1f}"))
    print(table(["tokens of prompt", "keys cached, CPU ms a token", "uncached", "ratio"], rows))
    return 0


def generator_settings(config: Config) -> dict[str, Any]:
    module = MitigatedDecoder(ChunkDetector(config).eval())
    signature = aarf_spec.signature(config)

    def step(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode():
            printed = module(*(inputs[tensor.name] for tensor in signature.inputs))
        return {tensor.name: value for tensor, value in zip(signature.outputs, printed, strict=True)}

    return {"step": step, "signature": signature, "heads": heads_of(config), "layers": layers_of(config)}


def _generate(generator: Generator, ids: list[int], count: int) -> tuple[float, Generated]:
    started = time.process_time()
    found = generator.generate(ids, (4, len(ids) - 4), max_new_tokens=count, mitigation=ALWAYS)
    return 1e3 * (time.process_time() - started), found


def _parser() -> Any:
    result = parser("benchmarks.hallucination.generation", __doc__.partition(":")[0] + ".", "", "--tokens 16")
    result.add_argument("--tokens", type=int, default=8, help="tokens that are timed, after the first (default: 8)")
    return result


if __name__ == "__main__":
    sys.exit(main())
