"""Counted windows: an engine that does not change is steady, also under arrivals; one that does not keep up is not."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from runtimes.bench.load import Window, account, poisson_arrivals
from runtimes.bench.plan import ARRIVALS, Settings
from runtimes.bench.steady_state import steady_from

_, MOST = Settings().sweep_windows
TRIALS = 200


# A closed loop ------------------------------------------------------------------------------------------------------


def calls(seconds: float, count: int = 9, wall_s: float | None = None) -> Window:
    return Window(samples_s=[seconds] * count, wall_s=wall_s or count * seconds, cpu_s=0.0)


@pytest.mark.parametrize(
    ("medians", "expected"),
    [
        ([1.0, 1.05, 1.09], 0),
        ([1.0, 1.05, 1.11], None),
        ([9.0, 1.0, 1.0, 1.0], 1),
        ([1.0, 9.0, 1.0, 1.05, 1.0, 1.09], 2),
        ([1.0, 1.0, 9.0, 1.0, 1.0], None),
        ([1.2, 1.15, 1.1, 1.05, 1.0], 2),
        ([1.0, 1.0], None),
        ([], None),
    ],
)
def test_the_stretch_is_the_longest_at_the_end_that_agrees_and_has_three_windows(
    medians: Sequence[float], expected: int | None
) -> None:
    assert steady_from([calls(each) for each in medians]) == expected


def test_throughput_has_to_agree_as_well_as_latency() -> None:
    assert steady_from([calls(1.0), calls(1.0, wall_s=18.0), calls(1.0), calls(1.0)]) is None
    assert steady_from([calls(1.0, wall_s=18.0), calls(1.0), calls(1.0), calls(1.0)]) == 1


def test_a_window_without_an_answer_is_in_no_steady_stretch() -> None:
    refused = Window(samples_s=[], wall_s=1.0, cpu_s=0.0, refused=9)
    assert steady_from([calls(1.0), refused, calls(1.0), calls(1.0), calls(1.0)]) == 2
    assert steady_from([refused] * 3) is None


# Arrivals ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine with calls of one second on average: in this process, or a server with instances.

    spread   of single calls, as a share
    queue    requests that may wait for an instance; more are refused at once
    """

    remote: bool = False
    instances: int = 1
    spread: float = 0.1
    queue: int = 10**9

    def window(self, rng: np.random.Generator, intended_s: np.ndarray, call_s: float) -> Window:
        """First come, first served."""
        free = [0.0] * self.instances
        begun, done = np.empty((2, len(intended_s)))
        refused = np.zeros(len(intended_s), bool)
        for i, at in enumerate(intended_s):
            refused[i] = np.sum(begun[:i][~refused[:i]] > at) >= self.queue
            begun[i] = at if refused[i] else max(at, heapq.heappop(free))
            done[i] = begun[i] + (0.01 if refused[i] else call_s * rng.lognormal(0, self.spread))
            if not refused[i]:
                heapq.heappush(free, done[i])
        seen = intended_s if self.remote else begun
        return account(intended_s, intended_s, done, 0.0, begun_s=seen, refused=refused)

    def run(self, seed: int, rate_per_s: float, *, fixed: int = 3, drift: float = 0.0, slow: int = -1,
            arrivals: int = ARRIVALS) -> list[Window]:  # fmt: skip
        """The windows of one run, `fixed` or more until they are steady, as `InterleavedRuns` measures them.

        drift   how much longer a call takes in the last of the `fixed` windows than in the first
        slow    a window in which the machine is busy: half as long again
        """
        rng, windows = np.random.default_rng([1, seed]), list[Window]()
        while len(windows) < fixed or (len(windows) < MOST and steady_from(windows) is None):
            turn = len(windows)
            intended_s = poisson_arrivals(rate_per_s, arrivals / rate_per_s, [seed, turn])
            call_s = (1 + drift * turn / (fixed - 1)) * (1.5 if turn == slow else 1.0)
            windows.append(self.window(rng, intended_s, call_s))
            windows[-1].rate_per_s = rate_per_s
        return windows


HERE, SERVER, THREE = Engine(), Engine(remote=True), Engine(remote=True, instances=3)
ENGINES = pytest.mark.parametrize("engine", [HERE, SERVER, THREE], ids=["here", "server", "three instances"])


def unstable(engine: Engine, rate_per_s: float, trials: int = TRIALS, **changes: int | float) -> float:
    """The share of runs that are marked."""
    runs = (engine.run(seed, rate_per_s, **changes) for seed in range(trials))  # type: ignore[arg-type]
    return sum(steady_from(run) is None for run in runs) / trials


@ENGINES
@pytest.mark.parametrize("load", [0.5, 0.8])
def test_an_engine_that_does_not_change_is_hardly_ever_marked(engine: Engine, load: float) -> None:
    assert unstable(engine, load) < 0.05
    noisy = Engine(remote=engine.remote, instances=engine.instances, spread=0.2)
    assert unstable(noisy, load) < 0.05


def test_the_rates_of_such_windows_agree_by_chance_alone() -> None:
    """The reason not to use them: 30 arrivals are 30 plus or minus 5."""
    runs = [HERE.run(seed, 0.8) for seed in range(TRIALS)]
    rates = [[len(window.samples_s) / window.wall_s for window in run[:3]] for run in runs]
    assert np.mean([max(each) <= 1.1 * min(each) for each in rates]) < 0.3


@ENGINES
@pytest.mark.parametrize("fixed", [3, MOST])
def test_an_engine_that_drifts_by_thirty_percent_over_the_run_is_marked(engine: Engine, fixed: int) -> None:
    assert unstable(engine, 0.5, drift=0.3, fixed=fixed) >= 0.9
    assert unstable(engine, 0.8, drift=0.3, fixed=fixed) >= 0.85
    assert unstable(engine, 0.5, drift=0.02, fixed=fixed) < 0.05


@ENGINES
@pytest.mark.parametrize("load", [1.2, 2.0, 5.0])
def test_an_engine_that_is_offered_more_than_it_can_do_is_marked(engine: Engine, load: float) -> None:
    assert unstable(engine, load * engine.instances, trials=30) == 1


def test_a_server_that_refuses_the_excess_is_steady_once_its_queue_is_short_against_a_window() -> None:
    """It answers or refuses every request; while its queue is still filling, it does not."""
    refusing = Engine(remote=True, instances=3, queue=4)
    assert unstable(refusing, 6.0, trials=10, arrivals=600) == 0
    assert unstable(Engine(remote=True, instances=3), 6.0, trials=10, arrivals=600) == 1
    assert sum(window.refused for window in refusing.run(0, 6.0, arrivals=600)) > 500


def test_windows_before_the_steady_stretch_of_arrivals_do_not_count() -> None:
    even = Engine(spread=0.02)
    assert {steady_from(even.run(seed, 0.5, slow=0)) for seed in range(TRIALS)} == {1}
    assert unstable(HERE, 0.5, slow=1) < 0.05
