"""Load: what each scenario calls, when, and what it counts."""

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from runtimes.bench.load import LATE_S, account, arriving, goodput, one_by_one, poisson_arrivals, posting, side_by_side
from runtimes.errors import EngineError, InputError, Overloaded


def test_one_by_one_calls_once_at_least_and_times_every_call() -> None:
    calls: list[int] = []
    window = one_by_one(lambda: calls.append(1), 0.0)
    assert len(window.samples_s) == len(calls) == 1
    window = one_by_one(lambda: calls.append(1), 0.002)
    assert len(window.samples_s) == len(calls) - 1 > 1
    assert sum(window.samples_s) <= window.wall_s


def test_the_device_is_asked_after_each_call_how_long_it_took() -> None:
    asked: list[str] = []
    window = one_by_one(lambda: asked.append("call"), 0.0, lambda: asked.append("device") or 0.25)  # type: ignore[func-returns-value]
    assert asked == ["call", "device"]
    assert window.device_s == [0.25]


def test_as_many_calls_are_in_flight_as_there_are_lanes() -> None:
    """Each call waits until three are in flight: with fewer it would wait for ever."""
    meeting = threading.Barrier(3, timeout=120)
    window = side_by_side([lambda: meeting.wait()] * 3, 0.0)
    assert len(window.samples_s) == 3


def test_a_lane_that_fails_ends_the_window_with_its_error() -> None:
    def fail() -> None:
        raise InputError("expected this")

    with pytest.raises(InputError, match="expected this"):
        side_by_side([fail, lambda: None], 0.01)
    with pytest.raises(InputError, match="expected this"):
        arriving([fail], np.zeros(3), queued=True)
    with pytest.raises(EngineError, match="ValueError: invalid literal"):
        arriving([lambda: int("no")], np.zeros(3), queued=False)


def every_third_refused() -> Callable[[], None]:
    """A call that takes a millisecond, and every third time a fifth of a second to be refused."""
    turn = itertools.count(1)

    def call() -> None:
        third = next(turn) % 3 == 0
        time.sleep(0.2 if third else 0.001)
        if third:
            raise Overloaded("expected room in the queue, found none")

    return call


def test_a_refusal_is_counted_and_its_time_is_in_no_latency() -> None:
    closed = one_by_one(every_third_refused(), 0.3)
    lanes = side_by_side([every_third_refused()] * 2, 0.3)
    arrived = arriving([every_third_refused()], np.zeros(7), queued=False)
    assert (len(arrived.samples_s), len(arrived.service_s), arrived.refused) == (5, 5, 2)
    for window in (closed, lanes, arrived):
        assert window.refused >= 1
        assert len(window.samples_s) >= 2 * (window.refused - 1)
        assert max(window.service_s or window.samples_s) < 0.19
    assert max(arrived.alone_s) < 0.19
    assert arrived.wall_s > 0.4
    assert goodput(arrived, bound_s=60.0) == pytest.approx(5 / arrived.wall_s), "however late it came"


def test_only_a_refusal_is_counted_as_one() -> None:
    for error in (EngineError("the server died"), InputError("no such input")):

        def fail(error: Exception = error) -> None:
            raise error

        for load in (lambda: one_by_one(fail, 0.0), lambda: side_by_side([fail], 0.0),
                     lambda: arriving([fail], np.zeros(2), queued=False)):  # fmt: skip
            with pytest.raises(type(error), match=str(error)):
                load()


def test_a_window_may_be_refused_altogether() -> None:
    def refuse() -> None:
        raise Overloaded("expected room in the queue, found none")

    for window in (one_by_one(refuse, 0.0), side_by_side([refuse], 0.0), arriving([refuse], np.zeros(1), queued=False)):
        assert (window.samples_s, window.refused) == ([], 1)


def test_what_an_engine_is_judged_by_does_not_depend_on_when_requests_arrive() -> None:
    """Four calls of one second: two alone, one that waits before the engine, one that waits in a server."""
    sent, begun, done = np.array([0.0, 0.5, 5.0, 5.0]), np.array([0.0, 1.0, 5.0, 5.0]), np.array([1.0, 2.0, 6.0, 7.0])
    window = account(sent, sent, done, 0.0, begun_s=begun)
    assert window.busy_s == pytest.approx(4.0)
    assert window.alone_s == pytest.approx([1.0, 1.0, 1.0])
    swapped = [1, 3, 0, 2]
    again = account(sent[swapped], sent[swapped], done[swapped], 0.0, begun_s=begun[swapped])
    assert again.busy_s == pytest.approx(4.0), "in whatever order lanes begin"


def test_arrivals_are_poisson_and_the_same_for_the_same_seed() -> None:
    times = poisson_arrivals(200.0, 50.0, [0, 1])
    np.testing.assert_array_equal(times, poisson_arrivals(200.0, 50.0, [0, 1]))
    assert not np.array_equal(times[:9], poisson_arrivals(200.0, 50.0, [0, 2])[:9])
    assert times[-1] < 50.0
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(1 / 200, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05), "exponential gaps: the deviation is the mean"
    assert np.corrcoef(gaps[:-1], gaps[1:])[0, 1] == pytest.approx(0, abs=0.05)
    assert len(poisson_arrivals(0.001, 0.1, [0])) == 1


def test_a_stall_counts_for_all_who_had_to_wait_behind_it() -> None:
    """Three requests are due while the first is still computed; a closed loop would not have sent them."""
    due = threading.Event()
    order: list[int] = []

    def call() -> None:
        if not order:
            assert due.wait(10)
        order.append(len(order))

    class Watched(np.ndarray):
        """Lets the first call go once the last arrival has been looked at."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from np.asarray(self)
            due.set()

    intended = np.zeros(4).view(Watched)
    window = arriving([call], intended, queued=True)
    assert order == [0, 1, 2, 3]
    assert len(window.samples_s) == 4
    assert min(window.samples_s) == window.samples_s[0] > 0
    assert window.samples_s == sorted(window.samples_s), "who came later in the queue waited longer"


def test_latency_is_counted_from_the_intended_time_and_service_from_the_real_one() -> None:
    intended = np.array([0.0, 1.0, 2.0])
    sent = np.array([0.0, 1.0 + LATE_S / 2, 2.5])
    done = np.array([0.4, 1.4, 2.75])
    window = account(intended, sent, done, cpu_s=0.1)
    assert window.samples_s == pytest.approx([0.4, 0.4, 0.75])
    assert window.service_s == pytest.approx([0.4, 0.4 - LATE_S / 2, 0.25])
    assert window.late == 1
    assert window.wall_s == 2.75
    assert goodput(window, bound_s=0.5) == pytest.approx(2 / 2.75)


def test_for_a_server_what_waits_for_a_free_lane_is_late_and_for_an_engine_it_is_queued() -> None:
    """One lane, busy with the first request until the others are due."""

    def run(queued: bool) -> tuple[list[float], list[float]]:
        held = threading.Event()
        threading.Timer(0.05, held.set).start()
        window = arriving([lambda: held.wait(10)], np.array([0.0, 0.0]), queued=queued)
        return window.samples_s, window.service_s

    latency, service = run(queued=True)
    assert service[1] == pytest.approx(latency[1], abs=0.04), "sent when it entered the queue"
    latency, service = run(queued=False)
    assert service[1] < latency[1] / 2, "sent when the lane was free"


def test_what_is_posted_waits_for_nobody_and_each_is_timed_by_itself() -> None:
    """None of a thousand is answered before the last is posted, and then in the opposite order."""
    waiting: list[Callable[[], None]] = []

    def post(i: int, resolve_config: Callable[[], None]) -> None:
        assert i == len(waiting)
        waiting.append(resolve_config)
        if len(waiting) == 1000:
            for each in reversed(waiting):
                each()

    window = posting(post, np.zeros(1000))
    assert len(window.samples_s) == 1000
    assert window.samples_s == sorted(window.samples_s, reverse=True)
    assert all(service <= latency for service, latency in zip(window.service_s, window.samples_s, strict=True))
