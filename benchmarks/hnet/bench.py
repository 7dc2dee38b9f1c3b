"""Measure an exported H-Net beside eager torch, and a stream beside whole prefixes: python -m benchmarks.hnet.bench

Times are CPU time of one thread, which other processes disturb less than wall time; compared calls alternate, and a
ratio is that of medians.
"""

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.process_cost import cpu_s, interleaved_cpu_s
from runtimes.artifact import artifact_name
from runtimes.errors import InputError
from runtimes.host.cli import artifact_arguments, command, parser, table
from runtimes.pipelines.hnet.byte_text import BOS
from runtimes.repository import find
from runtimes.runtime import Runtime, open_runtime
from training.checkpoint import Checkpoint, restore
from training.models.hnet.module import HNetForCausalLM
from training.spec import find_spec

STREAMED = 512  # bytes
EVERY = 16  # one in so many prefixes is measured
CALLS = 15
PASSES = 4  # over a text, byte by byte
Row = tuple[str, str, str, str, str]


@command
def main(argv: list[str] | None = None) -> int:
    """Print one table: the cost of a text, of a byte, and of a stream."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)
    checkpoint = Checkpoint.load(arguments.checkpoint)
    module = restore(checkpoint, find_spec("hnet")).requires_grad_(False)
    assert isinstance(module, HNetForCausalLM)
    text = real_text(checkpoint)
    names = [artifact_name(name, arguments.target, arguments.precision) for name in ("hnet", "hnet_step")]
    full_root, step_root = (find(arguments.repository, name) for name in names)
    with open_runtime(full_root) as full, open_runtime(step_root) as one:
        if {full.artifact.checkpoint, one.artifact.checkpoint} != {checkpoint.digest}:
            raise InputError(f"expected artifacts of {arguments.checkpoint}, found others; export it again")
        rows = [*texts(module, full, text), *steps(module, one, text), *streams(full, one, text)]
    config = checkpoint.config
    sizes = ", ".join(f"{name} {config[name]}" for name in ("model_arch", "model_dim", "d_state", "attention_capacity"))
    print(f"{sizes}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(table(["work", arguments.target, "compared with", "its time", "ratio"], rows))
    return 0


def real_text(checkpoint: Checkpoint) -> np.ndarray:
    """Held-out bytes of the checkpoint's sample inputs, from the first that begins a text. int64 [STREAMED]"""
    ids = checkpoint.sample_inputs()["byte_ids"].reshape(-1)
    start = int((ids == BOS).argmax())
    return np.resize(np.roll(ids, -start), STREAMED).astype(np.int64)


def texts(module: HNetForCausalLM, full: Runtime, text: np.ndarray) -> list[Row]:
    """The time of whole texts, beside the eager module."""
    rows = []
    for batch, length in ((1, 256), (1, 512), (8, 256)):
        ids = np.tile(text[:length], (batch, 1))
        inputs = {"byte_ids": ids, "lengths": np.full(batch, length)}
        arguments = [torch.from_numpy(array) for array in inputs.values()]

        def eager(arguments: list[torch.Tensor] = arguments) -> None:
            with torch.inference_mode():
                module(*arguments)

        def converted(inputs: Mapping[str, np.ndarray] = inputs) -> None:
            full.infer(inputs)

        converted(), eager()  # the first calls are not measured
        times = interleaved_cpu_s({"ours": converted, "theirs": eager}, CALLS)
        rows.append(compared(f"text of {batch} x {length}", times["ours"], "torch eager", times["theirs"]))
    return rows


def steps(module: HNetForCausalLM, one: Runtime, text: np.ndarray) -> list[Row]:
    """The time of a byte of a real text, for bytes that begin a segment and for others.

    Each engine computes a whole text before the other: alternating by byte, each would find the other's weights in the
    processor's cache.
    """
    spent: dict[bool, tuple[list[float], list[float]]] = {True: ([], []), False: ([], [])}
    for _ in range(PASSES):
        stream, state = one.stream(1), module.zero_state(1)
        for byte in text:
            started = time.process_time()
            printed = stream.step({"byte_ids": np.array([[byte]])})
            spent[bool(printed["boundary"].any())][0].append(time.process_time() - started)
        with torch.inference_mode():
            for byte in text:
                started = time.process_time()
                _, _, b, state = module.step(torch.tensor([byte]), state)
                spent[bool(b.any())][1].append(time.process_time() - started)
    rows = []
    for begins, (ours, theirs) in spent.items():
        if min(len(ours), len(theirs)) >= CALLS:
            name = f"byte that begins {'a' if begins else 'no'} segment ({len(ours) // PASSES} of {len(text)})"
            rows.append(compared(name, float(np.median(ours)), "torch eager", float(np.median(theirs))))
    return rows


def streams(full: Runtime, one: Runtime, text: np.ndarray) -> list[Row]:
    """The time of a stream, beside that of every whole prefix, and of its second half beside its first."""
    stream, spent = one.stream(1), []
    for byte in text:
        started = time.process_time()
        stream.step({"byte_ids": np.array([[byte]])})
        spent.append(time.process_time() - started)
    again = []
    for length in range(EVERY, len(text) + 1, EVERY):
        inputs = {"byte_ids": text[None, :length], "lengths": np.array([length])}
        full.infer(inputs)  # its memory is laid out at the first call of a size
        again.append(cpu_s(lambda inputs=inputs: full.infer(inputs)))  # type: ignore[misc]
    half = len(text) // 2
    prefixes = f"every prefix computed anew (1 in {EVERY} measured)"
    return [
        compared(f"stream of {len(text)} bytes", sum(spent), prefixes, EVERY * sum(again)),
        compared("second half of the stream", sum(spent[half:]), "first half", sum(spent[:half])),
    ]


def compared(work: str, ours_s: float, other: str, theirs_s: float) -> Row:
    return work, f"{1e3 * ours_s:.2f} ms", other, f"{1e3 * theirs_s:.2f} ms", f"{theirs_s / ours_s:.2f}"


def _parser() -> Any:
    result = parser(
        "benchmarks.hnet.bench",
        "Measures an exported H-Net beside eager torch, and a stream beside whole prefixes.",
        "--checkpoint checkpoints/hnet",
        "--checkpoint checkpoints/hnet --target openvino",
    )
    result.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    artifact_arguments(result)
    return result


if __name__ == "__main__":
    sys.exit(main())
