"""CPU time and peak memory of this process, for the measuring scripts."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def cpu_s(act: Callable[[], Any]) -> float:
    """CPU seconds of this process for one call, of all its threads."""
    started = time.process_time()
    act()
    return time.process_time() - started


def interleaved_cpu_s(acts: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each act; their calls alternate, so that other processes affect all alike."""
    samples = [{name: cpu_s(act) for name, act in acts.items()} for _ in range(rounds)]
    return {name: float(np.median([sample[name] for sample in samples])) for name in acts}


def peak_bytes() -> int:
    """Peak resident memory of this process; that of getrusage includes the process which started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
