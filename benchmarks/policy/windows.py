"""Measure windows of frames, cut from the table or all copied beforehand: python -m benchmarks.policy.windows"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

from benchmarks.process_cost import peak_bytes
from runtimes.errors import SlipwayError, require
from runtimes.host.cli import command, parser, table
from runtimes.pipelines.policy.melee import FRAME_WIDTH, LABEL_WIDTH
from training.models.policy.data import Game
from training.models.policy.windows import FrameTable, WindowDataset, Windows

MODULE = "benchmarks.policy.windows"
MODES = ("lazy", "eager")
DTYPES = ("float32", "float16")
GAME_FRAMES = 10_000
SETTINGS = ("frames", "window", "batch", "batches", "rounds")


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if options.child:
        _serve(options, *options.child)
        return 0
    rows = [row for dtype in DTYPES for row in _compare(options, dtype)]
    if options.json:
        settings = {name: getattr(options, name) for name in SETTINGS}
        print(json.dumps({"settings": settings, "cores": os.cpu_count(), "numpy": np.__version__, "rows": rows}))
    else:
        header = ("mode", "dtype", "table MB", "resident MB", "/ table", "peak MB", "p50 ms", "batches/s", "rounds")
        print(table(header, [_cells(row) for row in rows]))
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    summary = (
        "Builds a table of random frames and reads shuffled batches of windows from it. Lazy and eager each have a "
        "process of their own, and their rounds alternate. Resident memory is what a process gains after the imports "
        "and a first small batch; peak includes the building. A rate is one over the median time of a batch. The eager "
        "cases need as much memory as all windows together: 14 GB at the defaults."
    )
    arguments = parser(MODULE, summary, "", "--frames 38000 --json")
    arguments.add_argument("--frames", type=int, default=380_000, help="frames of the table (default: %(default)s)")
    arguments.add_argument("--window", type=int, default=30, help="frames in a window (default: %(default)s)")
    arguments.add_argument("--batch", type=int, default=256, help="windows in a batch (default: %(default)s)")
    arguments.add_argument("--batches", type=int, default=50, help="batches in a round (default: %(default)s)")
    arguments.add_argument("--rounds", type=int, default=12, help="rounds of each case (default: %(default)s)")
    arguments.add_argument("--json", action="store_true", help="print JSON only, with every sample")
    arguments.add_argument("--child", nargs=2, metavar=("MODE", "DTYPE"), help=argparse.SUPPRESS)
    return arguments.parse_args(argv)


def _compare(options: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """One row for each mode; their rounds alternate, so that noise of the machine affects both."""
    with ExitStack() as stack:
        children = {mode: stack.enter_context(_child(options, mode, dtype)) for mode in MODES}
        results = [(mode, _round(child)) for _ in range(options.rounds) for mode, child in children.items()]
    return [_summary(mode, dtype, [result for name, result in results if name == mode]) for mode in MODES]


@contextmanager
def _child(options: argparse.Namespace, mode: str, dtype: str) -> Iterator[subprocess.Popen[str]]:
    """A process that measures one round for each line on its standard input."""
    settings = [f"--{name}={getattr(options, name)}" for name in SETTINGS]
    arguments = [sys.executable, "-m", MODULE, *settings, "--child", mode, dtype]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            _round(child)  # the first round waits for the building and is not counted
            yield child
        finally:
            child.kill()


def _round(child: subprocess.Popen[str]) -> dict[str, Any]:
    assert child.stdin
    assert child.stdout
    try:
        print(file=child.stdin, flush=True)
        result: dict[str, Any] = json.loads(child.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError) as error:
        status = child.wait()
        raise SlipwayError(f"expected a result, found exit status {status}; the reason is the error above") from error
    return result


def _serve(options: argparse.Namespace, mode: Any, dtype: str) -> None:
    process = require("psutil", extra="train").Process()
    _warm_up(mode, dtype)
    before = process.memory_info().rss
    frames = FrameTable.from_games(_random_games(options.frames), getattr(torch, dtype))
    dataset = WindowDataset(Windows(frames, options.window, mode=mode))
    latency_s, resident = [], 0
    for done, _ in enumerate(sys.stdin):
        for i in range(options.batches):
            samples = (np.arange(options.batch) + (done * options.batches + i) * options.batch) % len(dataset)
            start = time.perf_counter()
            batch = dataset.__getitems__(samples)
            latency_s.append(time.perf_counter() - start)
            resident = max(resident, process.memory_info().rss - before)
        sizes = {"table_bytes": frames.nbytes, "batch_bytes": sum(tensor.nbytes for tensor in batch.values())}
        memory = {"resident_bytes": resident, "peak_bytes": peak_bytes() - before}
        print(json.dumps({**sizes, **memory, "latency_s": latency_s[-options.batches :]}), flush=True)


def _warm_up(mode: Any, dtype: str) -> None:
    """Load the code and memory that the first batch of a process needs, so that no round includes them."""
    frames = FrameTable.from_games(_random_games(64), getattr(torch, dtype))
    WindowDataset(Windows(frames, 8, mode=mode)).__getitems__(range(32))


def _random_games(frames: int) -> list[Game]:
    rng = np.random.default_rng(0)
    sizes = [GAME_FRAMES] * (frames // GAME_FRAMES) + [frames % GAME_FRAMES] * bool(frames % GAME_FRAMES)
    return [
        Game(
            name=str(i),
            group=str(i),
            frames=rng.random((size, FRAME_WIDTH), np.float32),
            labels=rng.integers(0, 5, (size, LABEL_WIDTH), np.uint8),
        )
        for i, size in enumerate(sizes)
    ]


def _summary(mode: str, dtype: str, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    samples_s = [each["latency_s"] for each in rounds]
    p50_s = statistics.median(sample for samples in samples_s for sample in samples)
    return {
        "mode": mode,
        "dtype": dtype,
        "table_bytes": rounds[-1]["table_bytes"],
        "batch_bytes": rounds[-1]["batch_bytes"],
        "resident_bytes": rounds[-1]["resident_bytes"],
        "peak_bytes": rounds[-1]["peak_bytes"],
        "p50_s": p50_s,
        "batches_per_s": 1 / p50_s,
        "batches_per_s_of_rounds": [1 / statistics.median(samples) for samples in samples_s],
        "samples_s": samples_s,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    rounds = row["batches_per_s_of_rounds"]
    return (
        row["mode"],
        row["dtype"],
        f"{row['table_bytes'] / 1e6:,.0f}",
        f"{row['resident_bytes'] / 1e6:,.0f}",
        f"{row['resident_bytes'] / row['table_bytes']:.3f}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{row['p50_s'] * 1e3:.3f}",
        f"{row['batches_per_s']:,.0f}",
        f"{min(rounds):,.0f}..{max(rounds):,.0f}",
    )


if __name__ == "__main__":
    sys.exit(main(None))
