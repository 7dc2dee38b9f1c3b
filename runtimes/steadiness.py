"""From which window on an engine was steady. What lies before is kept, and is in no figure."""

from collections.abc import Sequence
from math import ceil

import numpy as np

from runtimes.scenarios import Window
from runtimes.statistics import SAMPLES_FOR, STEADY_SPREAD, STEADY_WINDOWS, within

PARTS = 3  # of a stretch of arrivals that are compared with each other


def steady_from(windows: Sequence[Window]) -> int | None:
    """The first window of the longest steady stretch at the end, or None where there is none.

    Calls that wait for each other: STEADY_WINDOWS or more whose medians, and whose throughputs, all lie within
    STEADY_SPREAD of each other. Arrivals: `arrivals_steady`, and three quarters of all windows or more, for in fewer a
    slow drift would not show.
    """
    arrivals = bool(windows) and windows[0].rate_per_s > 0
    least = max(STEADY_WINDOWS, ceil(0.75 * len(windows)) if arrivals else 0)
    agree = arrivals_steady if arrivals else calls_steady
    return next((start for start in range(len(windows) - least + 1) if agree(windows[start:])), None)


def calls_steady(windows: Sequence[Window]) -> bool:
    """Whether every window has the same median latency and the same throughput, within STEADY_SPREAD."""
    if not all(window.samples_s for window in windows):
        return False
    medians = [float(np.median(window.samples_s)) for window in windows]
    return within(medians) and within([len(window.samples_s) / window.wall_s for window in windows])


def arrivals_steady(windows: Sequence[Window]) -> bool:
    """Whether the engine keeps up with these arrivals, and is as fast in each third of them as in the others.

    Neither is judged by how many happened to arrive, nor by how long they queued: both vary by more than STEADY_SPREAD
    from window to window when the engine does not change at all. It keeps up where, while anything waits, requests are
    settled as often as they are sent, less STEADY_SPREAD at most. How fast it is, say the calls that found no other
    before them; where fewer than a median needs did, as with a server that is never idle, the time per request while
    it was busy.
    """
    settled = [len(window.samples_s) + window.refused for window in windows]
    busy_s = [window.busy_s for window in windows]
    if sum(busy_s) / sum(settled) * windows[0].rate_per_s > 1 + STEADY_SPREAD:
        return False
    parts = [list(part) for part in np.array_split(np.arange(len(windows)), PARTS)]
    alone = [[sample for i in part for sample in windows[i].alone_s] for part in parts]
    if min(map(len, alone)) >= SAMPLES_FOR[50]:
        return within([float(np.median(samples)) for samples in alone])
    return within([sum(busy_s[i] for i in part) / sum(settled[i] for i in part) for part in parts])
