"""Statistics of noisy times: percentiles, steadiness, comparisons without false alarms that miss no slowdown."""

import numpy as np
import pytest

from runtimes.bench.statistics import (
    FEWEST_RUNS,
    SAMPLES_FOR,
    Difference,
    knee,
    paired_difference,
    paired_ratio,
    percentile,
    unpaired_difference,
)

PLANTED = 0.20


@pytest.mark.parametrize("p", SAMPLES_FOR)
def test_a_percentile_needs_as_many_samples_as_its_confidence(p: int) -> None:
    """The chance that all n samples lie below the p-th percentile is p ** n, and must be 1 % or less."""
    needed = next(n for n in range(1, 10_000) if (p / 100) ** n <= 0.01)
    samples = np.random.default_rng(0).exponential(size=needed).tolist()
    assert percentile(samples[:-1], p) is None
    assert percentile(samples, p) == pytest.approx(np.percentile(samples, p))
    assert percentile([], p) is None


def rounds(seed: int, planted: float, runs: int = 20) -> np.ndarray:
    """Medians of BASE, BASE again and NEW [3, runs] on a bad machine, NEW slower by `planted`.

    Half as slow again at the end as at the beginning, busy and idle for several rounds on end (autocorrelation .8),
    3 % from process to process, and every twentieth process disturbed by half.
    """
    rng = np.random.default_rng(seed)
    busy = np.zeros(runs)
    for i in range(1, runs):
        busy[i] = 0.8 * busy[i - 1] + rng.normal(0, 0.1)
    common = np.linspace(0, np.log(1.5), runs) + busy
    times = np.exp(common + rng.normal(0, 0.03, (3, runs))) * np.where(rng.random((3, runs)) < 0.05, 1.5, 1.0)
    times[2] *= 1 + planted
    return times


def test_twenty_comparisons_of_a_thing_with_itself_raise_no_alarm() -> None:
    assert {paired_difference(*rounds(seed, planted=0.0)).verdict(0.0) for seed in range(20)} == {"alike"}


def test_a_planted_slowdown_of_a_fifth_is_caught_every_time() -> None:
    found = [paired_difference(*rounds(seed, PLANTED)) for seed in range(20)]
    assert {each.verdict(0.0) for each in found} == {"slower"}
    assert np.median([each.slower for each in found]) == pytest.approx(PLANTED, abs=0.03)


def test_a_planted_speed_up_is_seen_too() -> None:
    assert {paired_difference(*rounds(seed, -PLANTED)).verdict(0.0) for seed in range(20)} == {"faster"}


def test_without_pairs_the_drift_of_the_machine_looks_like_a_slowdown() -> None:
    """The same machine, BASE measured in the first half of the time and NEW in the second: why runs are interleaved."""
    times = rounds(0, planted=0.0, runs=40)
    apart = unpaired_difference(times[0, :20], times[1, 20:])
    assert apart.low > 0
    assert paired_difference(*times).verdict(0.0) == "alike"


def test_runs_measured_apart_are_compared_by_their_own_spread() -> None:
    rng = np.random.default_rng(0)
    base, new = np.exp(rng.normal(0, 0.03, (2, 10)))
    assert unpaired_difference(base, new).verdict(0.0) == "alike"
    assert unpaired_difference(base, new * 1.2).verdict(0.0) == "slower"


@pytest.mark.parametrize(
    ("low", "high", "floor", "threshold", "verdict"),
    [
        (0.11, 0.20, 0.10, 0.0, "slower"),
        (0.09, 0.20, 0.10, 0.0, "alike"),  # past its interval, not past the floor
        (-0.01, 0.30, 0.0, 0.0, "alike"),  # past the floor, not past its interval
        (0.04, 0.06, 0.01, 0.05, "alike"),  # slower, but by less than what is tolerated
        (0.06, 0.08, 0.01, 0.05, "slower"),
        (-0.20, -0.11, 0.10, 0.0, "faster"),
        (-0.20, -0.08, 0.10, 0.0, "alike"),
    ],
)
def test_a_verdict_is_past_interval_floor_and_threshold(
    low: float, high: float, floor: float, threshold: float, verdict: str
) -> None:
    difference = Difference(slower=(low + high) / 2, low=low, high=high, floor=floor)
    assert difference.verdict(threshold) == verdict


def test_a_noisier_base_has_a_higher_floor() -> None:
    rng = np.random.default_rng(0)
    quiet, noisy = (paired_difference(*np.exp(rng.normal(0, sigma, (3, 10)))) for sigma in (0.01, 0.1))
    assert 0 < quiet.floor < noisy.floor


def test_too_few_runs_are_refused() -> None:
    few = np.ones((3, FEWEST_RUNS - 1))
    with pytest.raises(ValueError, match="expected 5 or more rounds, found 4"):
        paired_difference(*few)
    with pytest.raises(ValueError, match="expected 5 or more runs of each, found 4 and 4"):
        unpaired_difference(few[0], few[1])


def test_the_knee_is_where_throughput_stops_growing() -> None:
    """A server that takes 100 requests a second, 20 ms each: two in flight are enough."""
    flights = (1, 2, 4, 8)
    throughput = [min(n / 0.020, 100.0) for n in flights]
    latency = [n / rate for n, rate in zip(flights, throughput, strict=True)]
    assert flights[knee(list(zip(throughput, latency, strict=True)))] == 2


def test_a_paired_ratio_is_free_of_the_drift_that_both_share() -> None:
    """Times that triple meanwhile: the ratio of each pair is 2 within its noise of 1 %."""
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 20)
    base, other = 2 * drift * np.exp(rng.normal(0, 0.01, 20)), drift * np.exp(rng.normal(0, 0.01, 20))
    times, low, high = paired_ratio(base, other)
    assert 1.97 < low < times < high < 2.03
    with pytest.raises(ValueError, match="expected 5 or more pairs, found 4"):
        paired_ratio(base[:4], other[:4])
