"""The words of the protocol between a benchmark and its worker process, which may be of another checkout.

One JSON object per line. The first request opens an engine; each later one has `do` and the arguments of that act. An
answer is {"ok": {...}} or {"error": "..."}. `runtimes.compare` starts the worker of another version and is started by
another version, so no word, argument or field of an answer may change within PROTOCOL 1: the words are those of
version 0.1, and a window has exactly the fields of `runtimes.bench.load.Window`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROTOCOL = 1
DO = "do"
PREPARE = "prepare"
CLOSED_LOOP = "one_by_one"
CONCURRENT = "side_by_side"
OPEN_LOOP = "arriving"

Request = dict[str, Any]


def opening(root: Path, options: Mapping[str, Any]) -> Request:
    """The first request: opens the artifact in `root` with these options of `open_runtime`."""
    return {"root": str(root.absolute()), "options": dict(options)}


def prepare(sizes: Mapping[str, int]) -> Request:
    """Warms the engine at these sizes."""
    return {DO: PREPARE, "sizes": dict(sizes)}


def closed_loop(seconds: float) -> Request:
    """One window with one request in flight."""
    return {DO: CLOSED_LOOP, "seconds": seconds}


def concurrent(concurrency: int, seconds: float) -> Request:
    """One window with so many requests in flight."""
    return {DO: CONCURRENT, "lanes": concurrency, "seconds": seconds}


def open_loop(rate_per_s: float, seconds: float, seed: Sequence[int]) -> Request:
    """One window of Poisson arrivals; the same seed gives the same arrivals."""
    return {DO: OPEN_LOOP, "rate_per_s": rate_per_s, "seconds": seconds, "seed": list(seed)}
