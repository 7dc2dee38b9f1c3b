"""Load: the calls of each kind of load, their times, and what is counted."""

import itertools
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from runtimes.bench.load import LATE_S, account, closed_loop, concurrent, goodput, open_loop, poisson_arrivals, posting
from runtimes.errors import EngineError, InputError, Overloaded


def test_a_closed_loop_has_one_call_at_least_and_times_every_call() -> None:
    calls: list[int] = []
    window = closed_loop(lambda: calls.append(1), 0.0)
    assert len(window.samples_s) == len(calls) == 1
    window = closed_loop(lambda: calls.append(1), 0.002)
    assert len(window.samples_s) == len(calls) - 1 > 1
    assert sum(window.samples_s) <= window.wall_s


def test_the_time_on_the_device_is_read_after_each_call() -> None:
    order: list[str] = []
    window = closed_loop(lambda: order.append("call"), 0.0, lambda: order.append("device") or 0.25)  # type: ignore[func-returns-value]
    assert order == ["call", "device"]
    assert window.device_s == [0.25]


def test_each_concurrent_call_is_in_flight() -> None:
    """Each call waits until three are in flight: with fewer it would wait for ever."""
    meeting = threading.Barrier(3, timeout=120)
    window = concurrent([lambda: meeting.wait()] * 3, 0.0)
    assert len(window.samples_s) == 3


def test_a_call_that_fails_ends_the_window_with_its_error() -> None:
    def fail() -> None:
        raise InputError("expected this")

    with pytest.raises(InputError, match="expected this"):
        concurrent([fail, lambda: None], 0.01)
    with pytest.raises(InputError, match="expected this"):
        open_loop([fail], np.zeros(3), queued=True)
    with pytest.raises(EngineError, match="ValueError: invalid literal"):
        open_loop([lambda: int("no")], np.zeros(3), queued=False)


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
    closed = closed_loop(every_third_refused(), 0.3)
    parallel = concurrent([every_third_refused()] * 2, 0.3)
    arrived = open_loop([every_third_refused()], np.zeros(7), queued=False)
    assert (len(arrived.samples_s), len(arrived.service_s), arrived.refused) == (5, 5, 2)
    for window in (closed, parallel, arrived):
        assert window.refused >= 1
        assert len(window.samples_s) >= 2 * (window.refused - 1)
        assert max(window.service_s or window.samples_s) < 0.19
    assert max(arrived.alone_s) < 0.19
    assert arrived.wall_s > 0.4
    assert goodput(arrived, slo_s=60.0) == pytest.approx(5 / arrived.wall_s), "however late it was"


def test_only_a_refusal_is_counted_as_one() -> None:
    for error in (EngineError("the server died"), InputError("no such input")):

        def fail(error: Exception = error) -> None:
            raise error

        for load in (lambda: closed_loop(fail, 0.0), lambda: concurrent([fail], 0.0),
                     lambda: open_loop([fail], np.zeros(2), queued=False)):  # fmt: skip
            with pytest.raises(type(error), match=str(error)):
                load()


def test_a_window_may_be_refused_altogether() -> None:
    def refuse() -> None:
        raise Overloaded("expected room in the queue, found none")

    for window in (closed_loop(refuse, 0.0), concurrent([refuse], 0.0), open_loop([refuse], np.zeros(1), queued=False)):
        assert (window.samples_s, window.refused) == ([], 1)


def test_busy_and_lone_times_do_not_depend_on_the_order_of_arrival() -> None:
    """Four calls of one second: two alone, one that waits before the engine, one that waits in a server."""
    sent, begun, done = np.array([0.0, 0.5, 5.0, 5.0]), np.array([0.0, 1.0, 5.0, 5.0]), np.array([1.0, 2.0, 6.0, 7.0])
    window = account(sent, sent, done, 0.0, begun_s=begun)
    assert window.busy_s == pytest.approx(4.0)
    assert window.alone_s == pytest.approx([1.0, 1.0, 1.0])
    swapped = [1, 3, 0, 2]
    again = account(sent[swapped], sent[swapped], done[swapped], 0.0, begun_s=begun[swapped])
    assert again.busy_s == pytest.approx(4.0), "in any order of the beginnings"


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


def test_a_stall_counts_for_every_request_behind_it() -> None:
    """Three requests are due while the first is still computed; a closed loop would not have sent them."""
    due = threading.Event()
    order: list[int] = []

    def call() -> None:
        if not order:
            assert due.wait(10)
        order.append(len(order))

    class Watched(np.ndarray):
        """Ends the first call once the last arrival has been read."""

        def __iter__(self):  # type: ignore[no-untyped-def]
            yield from np.asarray(self)
            due.set()

    intended = np.zeros(4).view(Watched)
    window = open_loop([call], intended, queued=True)
    assert order == [0, 1, 2, 3]
    assert len(window.samples_s) == 4
    assert min(window.samples_s) == window.samples_s[0] > 0
    assert window.samples_s == sorted(window.samples_s), "a later request in the queue waited longer"


def test_latency_is_counted_from_the_intended_time_and_service_from_the_real_one() -> None:
    intended = np.array([0.0, 1.0, 2.0])
    sent = np.array([0.0, 1.0 + LATE_S / 2, 2.5])
    done = np.array([0.4, 1.4, 2.75])
    window = account(intended, sent, done, cpu_s=0.1)
    assert window.samples_s == pytest.approx([0.4, 0.4, 0.75])
    assert window.service_s == pytest.approx([0.4, 0.4 - LATE_S / 2, 0.25])
    assert window.late == 1
    assert window.wall_s == 2.75
    assert goodput(window, slo_s=0.5) == pytest.approx(2 / 2.75)


def test_a_request_that_waits_for_a_free_call_is_late_for_a_server_and_queued_for_an_engine() -> None:
    """One call, busy with the first request until the others are due."""

    def run(queued: bool) -> tuple[list[float], list[float]]:
        held = threading.Event()
        threading.Timer(0.05, held.set).start()
        window = open_loop([lambda: held.wait(10)], np.array([0.0, 0.0]), queued=queued)
        return window.samples_s, window.service_s

    latency, service = run(queued=True)
    assert service[1] == pytest.approx(latency[1], abs=0.04), "sent when it entered the queue"
    latency, service = run(queued=False)
    assert service[1] < latency[1] / 2, "sent when the call was free"


def test_posted_requests_do_not_wait_and_each_has_its_own_time() -> None:
    """None of a thousand is answered before the last is posted, and then in the opposite order."""
    waiting: list[Callable[[], None]] = []

    def post(i: int, done: Callable[[], None]) -> None:
        assert i == len(waiting)
        waiting.append(done)
        if len(waiting) == 1000:
            for each in reversed(waiting):
                each()

    window = posting(post, np.zeros(1000))
    assert len(window.samples_s) == 1000
    assert window.samples_s == sorted(window.samples_s, reverse=True)
    assert all(service <= latency for service, latency in zip(window.service_s, window.samples_s, strict=True))
