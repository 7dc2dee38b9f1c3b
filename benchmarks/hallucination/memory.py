"""Peak memory over the length of the prompt, fused and with all attention kept."""

import subprocess
import sys
from typing import Any

import torch

from benchmarks.hallucination.bench_decoder import as_tensors, decoder_config, prompt_and_answer
from benchmarks.process_cost import peak_bytes
from runtimes.host.cli import table
from training.models.hallucination.module import ChunkDetector, TokenDetector

COMMAND = "benchmarks.hallucination.bench"
LENGTHS = (512, 1024, 2048, 4096, 8192)


def bench_memory(arguments: Any) -> str:
    """Peak MiB above the loaded model by length, each in a process of its own."""
    rows = []
    for tokens in LENGTHS:
        cells: list[Any] = [tokens]
        for way in ("chunk", "token", "dense"):
            if way == "dense" and tokens > arguments.longest_dense:
                cells.append("-")
                continue
            command = [sys.executable, "-m", COMMAND, "memory", "--one", way, "--tokens", str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            cells.append(done.stdout.strip() if done.returncode == 0 else "out of memory")
        rows.append(cells)
    return table(["tokens", "by chunk, MiB", "by token, MiB", "output_attentions, MiB"], rows)


def measure_memory(way: str, tokens: int, answer: int) -> str:
    """MiB that one reading adds to the peak of this process."""
    config = decoder_config(LENGTHS[-1], level="token" if way == "dense" else way)
    given = as_tensors(prompt_and_answer(config, tokens, answer))
    detector = (ChunkDetector if way == "chunk" else TokenDetector)(config).eval()
    with torch.inference_mode():
        if way == "dense":
            detector.base.model.set_attn_implementation("eager")
        before = peak_bytes()
        if way == "dense":
            kept = detector.base.model.model(given["token_ids"], output_attentions=True, output_hidden_states=True)
            assert len(kept.attentions) == len(detector.base.model.model.layers)
        else:
            detector(**given)
    return f"{(peak_bytes() - before) / 2**20:.0f}"
