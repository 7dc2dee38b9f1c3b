"""Measure vLLM, plain and quantized, beside transformers' generate: python -m runtimes.bench.vllm --plain FOLDER

All engines are open at once and their rounds alternate, on the same prompts, so that the noise of the machine affects
all alike. Tokens are greedy, the same number after every prompt.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtimes.artifact import write_json
from runtimes.bench.vllm_engines import (
    LanguageEngine,
    Load,
    Row,
    TransformersEngine,
    VllmEngine,
    memory_bytes,
)
from runtimes.errors import InputError, require
from runtimes.host.cli import command, device_arguments, existing_folder, parser, table
from runtimes.host.progress import progress
from runtimes.search.papers import read_papers
from runtimes.vllm.artifact import CHECKPOINT
from runtimes.vllm.process import VllmModel

SCHEMA = "slipway.vllm_bench/1"
WARM_TOKENS = 4
PLAIN = "vLLM plain"
SPARE_TOKENS = 8  # of the context of vLLM


@command
def main(argv: list[str] | None = None) -> int:
    """Measure, print one table, and with --out keep every round."""
    arguments = _parser().parse_args(argv)
    checkpoints = {"plain": checkpoint(arguments.plain)}
    if arguments.quantized:
        checkpoints["quantized"] = checkpoint(arguments.quantized)
    loads, texts = read_loads(checkpoints["plain"], arguments)
    before = os.getloadavg()[0]
    with ExitStack() as stack:
        engines = list(open_engines(stack, checkpoints, arguments))
        rows = [row for load in loads for row in interleaved(engines, load, arguments.rounds)]
        quality = list(qualities([engine for engine in engines if isinstance(engine, VllmEngine)], texts))
    print(row_table(rows))
    print(f"\nprompts of {arguments.prompt_tokens} tokens, {arguments.tokens} after each, {arguments.rounds} rounds")
    print(f"load of the machine {before:.1f} before, {os.getloadavg()[0]:.1f} after; {arguments.threads} thread(s)")
    for each in quality:
        print(
            "{name}: perplexity {perplexity:.2f} of {tokens} held-out tokens, likeliest alike {alike:.3f}".format(
                **each
            )
        )
    if len(checkpoints) == 2:
        share = quantized_share(checkpoints["plain"], checkpoints["quantized"])
        print(f"bytes of the quantized layers over those in bfloat16: {share:.3f}")
    if arguments.out:
        write_json(arguments.out, {"schema": SCHEMA, "quality": quality, "rows": [asdict(row) for row in rows]})
    return 0


def open_engines(stack: ExitStack, checkpoints: dict[str, Path], arguments: Any) -> Iterator[LanguageEngine]:
    """Every engine, open until the stack is left."""
    options = {"device": arguments.device, "threads": arguments.threads}
    for dtype in arguments.transformers_dtype:
        for batched in (False, True):
            name = f"transformers {dtype}, {'one batch' if batched else 'prompt by prompt'}"
            engine = TransformersEngine(name, checkpoints["plain"], dtype=dtype, batched=batched, **options)
            stack.callback(engine.close)
            yield engine
    for name, folder in checkpoints.items():
        window = arguments.window + arguments.tokens + SPARE_TOKENS
        model = VllmModel({"model": str(folder), "dtype": "bfloat16", "max_model_len": window}, **options)
        stack.callback(model.close)
        yield VllmEngine(f"vLLM {name}", model)


def interleaved(engines: Sequence[LanguageEngine], load: Load, rounds: int) -> list[Row]:
    """A row of each engine with `rounds` rounds, which alternate, after a short one that does not count."""
    warm = replace(load, tokens=min(WARM_TOKENS, load.tokens))
    for engine in engines:
        engine.round(warm)
    rows = [
        Row(name=each.name, provider=each.provider, prompts=len(load.prompts), total=load.total) for each in engines
    ]
    for _ in progress(range(rounds), f"{len(load.prompts)} prompts"):
        for engine, row in zip(engines, rows, strict=True):
            row.turns.append(engine.round(load))
            row.memory_bytes = max(row.memory_bytes, memory_bytes(engine.pid))
    return rows


def qualities(engines: Sequence[VllmEngine], texts: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Perplexity of every checkpoint, and the share of likeliest tokens in which it agrees with the first."""
    found = [engine.scores(texts) for engine in engines]
    for engine, (logprobs, likeliest) in zip(engines, found, strict=True):
        yield {
            "name": engine.name,
            "tokens": len(logprobs),
            "perplexity": float(np.exp(-logprobs.astype(float).mean())),
            "alike": float((likeliest == found[0][1]).mean()),
        }


def read_loads(folder: Path, arguments: Any) -> tuple[list[Load], list[list[int]]]:
    """Prompts of one length and texts to score, from the file of held-out texts; `InputError` if it has too few."""
    tokenizers = require("tokenizers", extra="train")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [statement.text for paper in read_papers(arguments.data) for statement in paper.statements]
    rows = [encoding.ids[: arguments.window] for encoding in tokenizer.encode_batch(texts)]
    long = [row[: arguments.prompt_tokens] for row in rows if len(row) >= arguments.prompt_tokens]
    if len(long) < max(arguments.prompts):
        raise InputError(
            f"{arguments.data}: expected {max(arguments.prompts)} texts of {arguments.prompt_tokens} tokens or more, "
            f"found {len(long)}; use a shorter --prompt-tokens"
        )
    scored = [row for row in rows if len(row) > 1][: arguments.texts]
    return [Load(prompts=long[:count], tokens=arguments.tokens) for count in arguments.prompts], scored


def checkpoint(folder: Path) -> Path:
    """The Hugging Face folder in the version folder of an artifact, or the folder itself."""
    existing_folder(folder, "a checkpoint")
    inner = folder / CHECKPOINT
    return (inner if inner.is_dir() else folder).absolute()


def quantized_share(plain: Path, quantized: Path) -> float:
    """Bytes of the quantized layers, with scales and zero points, over their bytes in bfloat16."""
    wide, small = headers(plain), headers(quantized)
    layers = {name.removesuffix(".weight_packed") for name in small if name.endswith(".weight_packed")}
    if not layers:
        raise InputError(f"{quantized}: expected packed weights, found none; name a quantized decoder")
    packed = sum(end - start for name, (_, (start, end)) in small.items() if name.rpartition(".")[0] in layers)
    return packed / sum(2 * int(np.prod(wide[f"{layer}.weight"][0])) for layer in layers)


def headers(folder: Path) -> dict[str, tuple[list[int], list[int]]]:
    """Shape and byte range of every tensor in the safetensors files of a folder."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        found |= {name: (each["shape"], each["data_offsets"]) for name, each in header.items() if "shape" in each}
    return found


def row_table(rows: Sequence[Row]) -> str:
    """The rows as text, with the ratios to the first engine and to plain vLLM under the same load."""
    lines = []
    for row in rows:
        alike = [other for other in rows if other.prompts == row.prompts]
        plain = next((other for other in alike if other.name == PLAIN), alike[0])
        seconds = [each.seconds for each in row.turns]
        lines.append(
            (
                row.prompts,
                row.name,
                f"{row.tokens_per_s:.1f}",
                f"{row.total / max(seconds):.1f} to {row.total / min(seconds):.1f}",
                f"{row.tokens_per_s / alike[0].tokens_per_s:.2f}",
                f"{row.tokens_per_s / plain.tokens_per_s:.2f}",
                f"{row.cpu_ms_per_token:.1f}",
                f"{1000 * row.first_s:.0f}",
                f"{row.memory_bytes / 2**30:.2f}",
                row.provider,
            )
        )
    header = ["prompts", "engine", "tokens/s", "range", "x first", "x vLLM plain", "CPU ms/token", "first ms", "GiB"]
    return table([*header, "provider"], lines)


def _parser() -> Any:
    result = parser(
        "runtimes.bench.vllm",
        __doc__.partition(":")[0] + ".",
        "--plain decoders/90m --quantized decoders/90m_w4 --data stacks_valid.jsonl",
        "--plain decoders/90m --quantized decoders/90m_w4 --data stacks_valid.jsonl --rounds 9 --out results.json",
    )
    result.add_argument("--plain", type=Path, required=True, help="folder of the decoder in bfloat16, or its artifact")
    result.add_argument(
        "--quantized", type=Path, help="folder of the quantized decoder, or its artifact (default: none)"
    )
    result.add_argument("--data", type=Path, required=True, help="held-out statements: prompts, and texts to score")
    result.add_argument(
        "--prompts", type=int, nargs="+", default=[1, 16], help="prompts at once, a table for each (default: 1 16)"
    )
    result.add_argument("--prompt-tokens", type=int, default=32, help="tokens of a prompt (default: %(default)s)")
    result.add_argument("--tokens", type=int, default=32, help="tokens after each prompt (default: %(default)s)")
    result.add_argument("--texts", type=int, default=128, help="texts to score (default: %(default)s)")
    result.add_argument(
        "--window", type=int, default=128, help="tokens of a text to score, at most (default: %(default)s)"
    )
    result.add_argument("--rounds", type=int, default=5, help="rounds of each engine (default: %(default)s)")
    device_arguments(result)
    result.add_argument(
        "--transformers-dtype",
        nargs="*",
        default=["bfloat16", "float32"],
        help="dtypes of transformers (default: bfloat16 float32)",
    )
    result.add_argument("--out", type=Path, help="keep every round in this file (default: none)")
    return result


if __name__ == "__main__":
    sys.exit(main())
