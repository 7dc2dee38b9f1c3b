"""What windows cost in memory and in time: cut from the table, or all copied beforehand."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from runtimes.command import command, parser, table
from runtimes.errors import SlipwayError, require
from runtimes.melee import FRAME_WIDTH, LABEL_WIDTH
from training.models.policy.data import Game
from training.models.policy.windows import FrameTable, WindowDataset, Windows

MODULE = "training.models.policy.windows_bench"
GAME_FRAMES = 10_000
CASES = (("lazy", "float32"), ("eager", "float32"), ("lazy", "float16"), ("eager", "float16"))


@command
def main(argv: list[str] | None = None) -> int:
    options = _options(argv)
    if options.child:
        print(json.dumps(_measure(options, *options.child)))
        return 0
    # Interleaved, so that a slow minute of the machine falls on every case.
    runs = [_in_child(options, *case) for _ in range(options.repeats) for case in CASES]
    rows = [_summary(case, [run for run in runs if (run["mode"], run["dtype"]) == case]) for case in CASES]
    if options.json:
        keys = ("frames", "window", "batch", "batches", "repeats")
        settings = {key: getattr(options, key) for key in keys} | {"cores": os.cpu_count(), "numpy": np.__version__}
        print(json.dumps({"settings": settings, "rows": rows}))
        return 0
    header = ("mode", "table", "table MB", "resident MB", "resident / table", "peak MB", "batches/s", "lowest..highest")
    print(table(header, [_cells(row) for row in rows]))
    return 0


def _options(argv: list[str] | None) -> argparse.Namespace:
    summary = (
        "Builds a table of random frames and reads shuffled batches of windows from it, each case in a process of its "
        "own. Resident memory counts from after the imports and a first small batch; peak includes the building. A "
        "rate is one over the median time of a batch. The eager cases need as much memory as all windows together."
    )
    arguments = parser(MODULE, summary, "", "--frames 38000 --json")
    arguments.add_argument("--frames", type=int, default=380_000)
    arguments.add_argument("--window", type=int, default=30, help="frames in a window")
    arguments.add_argument("--batch", type=int, default=256, help="windows in a batch")
    arguments.add_argument("--batches", type=int, default=300, help="batches timed in each run")
    arguments.add_argument("--repeats", type=int, default=3, help="runs of each case")
    arguments.add_argument("--json", action="store_true", help="print only JSON, with every sample")
    arguments.add_argument("--child", nargs=2, metavar=("MODE", "DTYPE"), help=argparse.SUPPRESS)
    return arguments.parse_args(argv)


def _in_child(options: argparse.Namespace, mode: str, dtype: str) -> dict[str, Any]:
    sizes = [f"--{name}={getattr(options, name)}" for name in ("frames", "window", "batch", "batches")]
    child = subprocess.run(
        [sys.executable, "-m", MODULE, *sizes, "--child", mode, dtype], capture_output=True, text=True, check=False
    )
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no word"])[-1]
        raise SlipwayError(f"expected a result of {mode} {dtype}, found exit status {child.returncode}: {reason}")
    result: dict[str, Any] = json.loads(child.stdout)
    return result


def _measure(options: argparse.Namespace, mode: Any, dtype: str) -> dict[str, Any]:
    process = require("psutil", extra="train").Process()
    _warm_up(mode, dtype)
    before = process.memory_info().rss
    frames = FrameTable.from_games(_random_games(options.frames), dtype)
    dataset = WindowDataset(Windows(frames, options.window, mode=mode))
    spans = [np.arange(options.batch) + i * options.batch for i in range(options.batches + 20)]
    latency_s, resident = [], 0
    for span in spans:
        start = time.perf_counter()
        batch = dataset.__getitems__(span % len(dataset))
        latency_s.append(time.perf_counter() - start)
        resident = max(resident, process.memory_info().rss - before)
    return {
        "mode": dataset.windows.mode,
        "dtype": dtype,
        "table_bytes": frames.nbytes,
        "batch_bytes": sum(tensor.nbytes for tensor in batch.values()),
        "resident_bytes": resident,
        "peak_bytes": _peak_bytes() - before,
        "latency_s": latency_s[20:],
    }


def _warm_up(mode: Any, dtype: str) -> None:
    """Code and arenas that the first batch of a process touches are in memory, and not on the windows' account."""
    WindowDataset(Windows(FrameTable.from_games(_random_games(64), dtype), 8, mode=mode)).__getitems__(range(32))


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


def _peak_bytes() -> int:
    with open("/proc/self/status") as status:
        kilobytes = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    return int(kilobytes) * 1024


def _summary(case: tuple[str, str], runs: list[dict[str, Any]]) -> dict[str, Any]:
    medians_s = [statistics.median(run["latency_s"]) for run in runs]
    return {
        "mode": case[0],
        "dtype": case[1],
        "table_bytes": runs[0]["table_bytes"],
        "resident_bytes": max(run["resident_bytes"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "batches_per_s": 1 / statistics.median(sample for run in runs for sample in run["latency_s"]),
        "batches_per_s_of_runs": [1 / median for median in medians_s],
        "latency_s": [run["latency_s"] for run in runs],
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["mode"],
        row["dtype"],
        f"{row['table_bytes'] / 1e6:,.0f}",
        f"{row['resident_bytes'] / 1e6:,.0f}",
        f"{row['resident_bytes'] / row['table_bytes']:.3f}",
        f"{row['peak_bytes'] / 1e6:,.0f}",
        f"{row['batches_per_s']:,.0f}",
        f"{min(row['batches_per_s_of_runs']):,.0f}..{max(row['batches_per_s_of_runs']):,.0f}",
    )


if __name__ == "__main__":
    sys.exit(main(None))
