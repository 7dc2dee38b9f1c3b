"""Statistics of noisy times: percentiles with enough samples, steadiness, intervals, noise floors, knees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# The smallest n for which the largest sample bounds the percentile at 99 % confidence: ln 0.01 / ln p.
SAMPLES_FOR = {50: 7, 90: 44, 95: 90, 99: 459}
STEADY_WINDOWS, STEADY_SPREAD = 3, 0.10
RESAMPLES = 4000
CONFIDENCE = 0.95
FLOOR_CONFIDENCE = 0.99
FEWEST_RUNS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much slower NEW is than BASE, as a share of BASE: estimate, interval, and the noise floor of an A/A test."""

    slower: float
    low: float
    high: float
    floor: float

    def verdict(self, threshold: float) -> str:
        """`slower` or `faster` only where the whole interval lies past both the floor and the threshold."""
        least = max(threshold, self.floor)
        if self.low > least:
            return "slower"
        # A ratio r is as far from 1 as 1 / r.
        return "faster" if self.high < 1 / (1 + least) - 1 else "alike"


def percentile(samples_s: Sequence[float], p: int) -> float | None:
    """The p-th percentile of pooled raw samples, or None where there are fewer than SAMPLES_FOR."""
    return float(np.percentile(samples_s, p)) if len(samples_s) >= SAMPLES_FOR[p] else None


def within(values: Sequence[float]) -> bool:
    """Whether all values lie within STEADY_SPREAD of each other."""
    return max(values) <= (1 + STEADY_SPREAD) * min(values)


def bootstrap_medians(values: np.ndarray, rng: np.random.Generator, resamples: int = RESAMPLES) -> np.ndarray:
    """The medians of `resamples` draws with replacement from `values`, float64 [resamples]."""
    return np.median(rng.choice(values, (resamples, len(values))), axis=1)


def paired_difference(base: ArrayLike, again: ArrayLike, new: ArrayLike, confidence: float = CONFIDENCE) -> Difference:
    """NEW against BASE from rounds in which BASE ran twice, under the same conditions: one median a run.

    Per round, log(new) less the mean log of both runs of BASE: drift over the rounds cancels. The floor is the same
    for BASE against itself: the FLOOR_CONFIDENCE quantile of |median| over random signs of log(base / again), whose
    signs carry no information. ValueError for fewer than FEWEST_RUNS rounds.
    """
    base_log, again_log, new_log = (np.log(np.asarray(each, float)) for each in (base, again, new))
    if len(base_log) < FEWEST_RUNS:
        raise ValueError(f"expected {FEWEST_RUNS} or more rounds, found {len(base_log)}")
    rng = np.random.default_rng(0)
    effect = new_log - (base_log + again_log) / 2
    null = base_log - again_log
    signs = rng.choice((-1.0, 1.0), (RESAMPLES, len(null)))
    floor = np.quantile(np.abs(np.median(signs * null, axis=1)), FLOOR_CONFIDENCE)
    return _difference(float(np.median(effect)), bootstrap_medians(effect, rng), float(floor), confidence)


def unpaired_difference(base: ArrayLike, new: ArrayLike, confidence: float = CONFIDENCE) -> Difference:
    """NEW against BASE from runs that were measured apart, one median a run.

    The floor is the distance between two random halves of one side's runs, of the worse side. A change of the machine
    between the two measurements is in no floor: interleave the runs where possible.
    ValueError for fewer than FEWEST_RUNS runs.
    """
    sides = [np.log(np.asarray(each, float)) for each in (base, new)]
    if min(map(len, sides)) < FEWEST_RUNS:
        raise ValueError(
            f"expected {FEWEST_RUNS} or more runs of each, found {' and '.join(str(len(s)) for s in sides)}"
        )
    rng = np.random.default_rng(0)
    medians = [bootstrap_medians(side, rng) for side in sides]
    floor = max(float(np.quantile(_half_differences(side, rng), FLOOR_CONFIDENCE)) for side in sides)
    estimate = float(np.median(sides[1]) - np.median(sides[0]))
    return _difference(estimate, medians[1] - medians[0], floor, confidence)


def paired_ratio(base: ArrayLike, other: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """The median of base / other over pairs measured next to each other, with its bootstrap interval.

    ValueError for fewer than FEWEST_RUNS pairs.
    """
    logs = np.log(np.asarray(base, float) / np.asarray(other, float))
    if len(logs) < FEWEST_RUNS:
        raise ValueError(f"expected {FEWEST_RUNS} or more pairs, found {len(logs)}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap_medians(logs, np.random.default_rng(0)), (tail, 1 - tail))
    return tuple(float(np.exp(each)) for each in (np.median(logs), low, high))  # type: ignore[return-value]


def knee(points: Sequence[tuple[float, float]]) -> int:
    """The index of the point (throughput, latency) with the most throughput per latency.

    Past it, latency grows faster than throughput (power, as Kleinrock 1979 defines it).
    """
    return int(np.argmax([throughput / latency for throughput, latency in points]))


def _half_differences(logs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    shuffled = rng.permuted(np.tile(logs, (RESAMPLES, 1)), axis=1)
    half = len(logs) // 2
    return np.abs(np.median(shuffled[:, :half], axis=1) - np.median(shuffled[:, half:], axis=1))


def _difference(estimate: float, draws: np.ndarray, floor: float, confidence: float) -> Difference:
    """The difference from logarithms of ratios."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    slower, low, high, floor = (float(np.expm1(each)) for each in (estimate, low, high, floor))
    return Difference(slower=slower, low=low, high=high, floor=floor)
