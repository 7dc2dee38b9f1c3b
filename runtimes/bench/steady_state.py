"""The window from which an engine was steady. Earlier windows are kept, and no figure uses them."""

from collections.abc import Sequence
from itertools import pairwise
from math import ceil

import numpy as np

from runtimes.bench.load import Window
from runtimes.bench.statistics import SAMPLES_FOR, STEADY_SPREAD, STEADY_WINDOWS, within

PARTS = 3  # of a sequence of arrival windows; they are compared with each other


def steady_from(windows: Sequence[Window]) -> int | None:
    """The first window of the longest steady stretch at the end, or None where there is none.

    In a closed loop: STEADY_WINDOWS or more whose medians, and whose throughputs, all lie within STEADY_SPREAD of each
    other. For arrivals: `arrivals_steady`, and three quarters of all windows or more, because fewer hide a slow drift.
    """
    if windows and windows[0].rate_per_s:
        least = max(STEADY_WINDOWS, ceil(0.75 * len(windows)))
        return next((i for i in range(len(windows) - least + 1) if arrivals_steady(windows[i:])), None)
    # A window without an answer has no median, and is in no steady stretch.
    medians = [float(np.median(window.samples_s)) if window.samples_s else 0.0 for window in windows]
    rates = [len(window.samples_s) / window.wall_s for window in windows]
    starts = range(len(windows) - STEADY_WINDOWS + 1)
    return next((i for i in starts if min(medians[i:]) > 0 and within(medians[i:]) and within(rates[i:])), None)


def arrivals_steady(windows: Sequence[Window]) -> bool:
    """Whether the engine keeps up with these arrivals, at the same speed in each third of the windows.

    Neither is computed from the number of arrivals, nor from the time in the queue: both vary by more than
    STEADY_SPREAD from window to window for an engine that does not change at all. The engine keeps up if, while it is
    busy, it completes requests at the rate of the arrivals, less STEADY_SPREAD at most. Its speed is the median of the
    calls that began while no other was in progress; where these are too few for a median, as with a server that is
    never idle, it is the busy time per request.
    """
    if windows[0].rate_per_s * busy_per_request_s(windows) > 1 + STEADY_SPREAD:
        return False
    bounds = [len(windows) * i // PARTS for i in range(PARTS + 1)]  # the first is the shortest: a slow start shows
    parts = [windows[start:end] for start, end in pairwise(bounds)]
    alone = [[sample for window in part for sample in window.alone_s] for part in parts]
    if min(map(len, alone)) >= SAMPLES_FOR[50]:
        return within([float(np.median(samples)) for samples in alone])
    return within([busy_per_request_s(part) for part in parts])


def busy_per_request_s(windows: Sequence[Window]) -> float:
    """Busy time of the engine for each request that it answered or refused."""
    return sum(window.busy_s for window in windows) / sum(len(window.samples_s) + window.refused for window in windows)
