"""What an exported H-Net costs beside eager torch and beside reading every prefix again.

Times are CPU time of one thread, which other processes disturb less than they do a clock on the wall; what is compared
runs in turns, and a ratio is that of medians.
"""

import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtimes.artifact import artifact_name
from runtimes.errors import InputError
from runtimes.host.cli import command, parser, table
from runtimes.pipelines.hnet.byte_text import BOS
from runtimes.repository import find
from runtimes.runtime import Runtime, open_runtime
from training.checkpoint import Checkpoint, restore
from training.models.hnet.module import HNetForCausalLM
from training.spec import find_spec

STREAMED = 512  # bytes
EVERY = 16  # of the prefixes that are measured
TURNS = 15
PASSES = 4  # over a text by each, byte by byte
Row = tuple[str, str, str, str, str]


@command
def main(argv: list[str] | None = None) -> int:
    """Print one table: the cost of a text, of a byte, and of a stream."""
    result = parser(
        "benchmarks.hnet.bench",
        __doc__.replace("\n", " ").strip(),
        "--checkpoint checkpoints/hnet --repository model_repository",
    )
    result.add_argument("--checkpoint", type=Path, required=True, help="folder of the checkpoint")
    result.add_argument("--repository", type=Path, default=Path("model_repository"), help="where it was exported to")
    result.add_argument("--target", default="onnx", help="target of the artifacts (default: onnx)")
    result.add_argument("--precision", default="fp32", help="precision of the artifacts (default: fp32)")
    arguments = result.parse_args(argv)
    torch.set_num_threads(1)
    checkpoint = Checkpoint.load(arguments.checkpoint)
    module = restore(checkpoint, find_spec("hnet")).requires_grad_(False)
    assert isinstance(module, HNetForCausalLM)
    text = real_text(checkpoint)
    names = [artifact_name(name, arguments.target, arguments.precision) for name in ("hnet", "hnet_step")]
    whole, step = (find(arguments.repository, name) for name in names)
    with open_runtime(whole) as full, open_runtime(step) as one:
        if {full.artifact.checkpoint, one.artifact.checkpoint} != {checkpoint.digest}:
            raise InputError(f"expected artifacts of {arguments.checkpoint}, found others; export it again")
        rows = [*texts(module, full, text), *steps(module, one, text), *streams(full, one, text)]
    config = checkpoint.config
    sizes = ", ".join(f"{name} {config[name]}" for name in ("model_arch", "model_dim", "d_state", "attention_capacity"))
    print(f"{sizes}; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    print(table(["what", arguments.target, "beside it", "found", "ratio"], rows))
    return 0


def real_text(checkpoint: Checkpoint) -> np.ndarray:
    """Held-out bytes of the checkpoint's sample inputs, from the one that begins a text on. int64 [STREAMED]"""
    ids = checkpoint.sample_inputs()["byte_ids"].reshape(-1)
    start = int((ids == BOS).argmax())
    return np.resize(np.roll(ids, -start), STREAMED).astype(np.int64)


def texts(module: HNetForCausalLM, full: Runtime, text: np.ndarray) -> list[Row]:
    """Whole texts, beside the eager module."""
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

        ours, theirs = in_turns(converted, eager)
        rows.append(compared(f"text of {batch} x {length}", ours, "torch eager", theirs))
    return rows


def steps(module: HNetForCausalLM, one: Runtime, text: np.ndarray) -> list[Row]:
    """Bytes of a real text, read from its start by each in turns, apart by whether a segment begins there.

    A whole text at a time: byte by byte in turns, each would find the weights of the other in the cache.
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
        if min(len(ours), len(theirs)) >= TURNS:
            name = f"byte that begins {'a' if begins else 'no'} segment ({len(ours) // PASSES} of {len(text)})"
            rows.append(compared(name, float(np.median(ours)), "torch eager", float(np.median(theirs))))
    return rows


def streams(full: Runtime, one: Runtime, text: np.ndarray) -> list[Row]:
    """A stream of bytes, beside the whole prefix read again at every byte, and its second half beside its first."""
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
    prefixes = f"every prefix read again (1 in {EVERY} measured)"
    return [
        compared(f"stream of {len(text)} bytes", sum(spent), prefixes, EVERY * sum(again)),
        compared("second half of the stream", sum(spent[half:]), "first half", sum(spent[:half])),
    ]


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[float, float]:
    """Median CPU seconds of each, called in turns after a first call."""
    ours(), theirs()
    spent = np.array([(cpu_s(ours), cpu_s(theirs)) for _ in range(TURNS)])
    one, other = np.median(spent, 0)
    return float(one), float(other)


def cpu_s(act: Callable[[], Any]) -> float:
    """CPU seconds of this process for one call."""
    started = time.process_time()
    act()
    return time.process_time() - started


def compared(what: str, ours_s: float, workspace: str, theirs_s: float) -> Row:
    return what, f"{1e3 * ours_s:.2f} ms", workspace, f"{1e3 * theirs_s:.2f} ms", f"{theirs_s / ours_s:.2f}"


if __name__ == "__main__":
    sys.exit(main())
