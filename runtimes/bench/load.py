"""Load on an engine: a closed loop, concurrent requests, or an open loop of arrivals at intended times."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from runtimes.errors import FOREIGN, EngineError, Overloaded, SlipwayError, error_text

LATE_S = 1e-3  # a request that is sent this long after its intended time counts as late
LEAD_S = 0.005  # between the start of the clock and the first arrival
SCENARIOS = ("single-stream", "offline", "server", "concurrency")

Call = Callable[[], Any]


@dataclass(kw_only=True, slots=True)
class Window:
    """One window of load. `samples_s` are latencies of answers; of arrivals, from the intended time of sending.

    wall_s      from the first sending to the last answer
    cpu_s       CPU time of the calling process in the window, of all its threads
    refused     number of requests that a busy server refused; they have no sample
    device_s    time on the GPU between events around each call; empty where there is none

    Of arrivals only:

    rate_per_s  intended arrivals a second
    service_s   latencies from the real time of sending
    alone_s     durations of calls that began while no other was in progress
    busy_s      time in which at least one request was sent and neither answered nor refused
    late        number of requests sent more than LATE_S after their intended time
    """

    samples_s: list[float]
    wall_s: float
    cpu_s: float
    refused: int = 0
    device_s: list[float] = field(default_factory=list)
    rate_per_s: float = 0.0
    service_s: list[float] = field(default_factory=list)
    alone_s: list[float] = field(default_factory=list)
    busy_s: float = 0.0
    late: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def closed_loop(call: Call, seconds: float, device_time: Callable[[], float] | None = None) -> Window:
    """One request in flight for this long, and one call at least.

    `device_time` returns the seconds of the last call on the GPU; it runs after each call, outside of its time.
    """
    taken: list[float | None] = []
    device: list[float] = []
    cpu, started = time.process_time_ns(), time.perf_counter_ns()
    end = started + int(seconds * 1e9)
    while not taken or time.perf_counter_ns() < end:
        taken.append(_answered_in(call))
        if device_time and taken[-1] is not None:
            device.append(device_time())
    wall = time.perf_counter_ns() - started
    return _closed_loop(taken, wall, time.process_time_ns() - cpu, device)


def concurrent(calls: Sequence[Call], seconds: float) -> Window:
    """len(calls) requests in flight for this long: a closed loop for each call, in a thread of its own.

    A refused call is repeated at once, so that the number in flight stays the same.
    """
    taken: list[list[float | None]] = [[] for _ in calls]
    together = threading.Barrier(len(calls))

    def loop(call: Call, own: list[float | None]) -> None:
        together.wait()
        end = time.perf_counter_ns() + int(seconds * 1e9)
        while not own or time.perf_counter_ns() < end:
            own.append(_answered_in(call))

    cpu, started = time.process_time_ns(), time.perf_counter_ns()
    _run_threads([partial(loop, *each) for each in zip(calls, taken, strict=True)], together.abort)
    wall, cpu = time.perf_counter_ns() - started, time.process_time_ns() - cpu
    return _closed_loop([each for own in taken for each in own], wall, cpu)


def poisson_arrivals(rate_per_s: float, seconds: float, seed: Sequence[int]) -> np.ndarray:
    """Intended times of sending in seconds, float64 [arrivals], one at least; the same for the same seed."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate_per_s, max(1, int(2 * rate_per_s * seconds) + 50))
    times = np.cumsum(gaps)
    return times[: max(1, int(np.searchsorted(times, seconds)))]


def open_loop(calls: Sequence[Call], intended_s: np.ndarray, *, queued: bool) -> Window:
    """Requests sent at their intended times, whether earlier requests are answered or not.

    Each of `calls` takes one request at a time. With `queued` the queue before the calls is part of the measurement,
    and a request counts as sent when it enters the queue: for an engine in this process. Without, it counts as sent
    when a call begins: a server has its own queue, and a request that waits here for a free call is late.
    """
    entered, begun, done = (np.zeros(len(intended_s)) for _ in range(3))
    refused = np.zeros(len(intended_s), bool)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    origin = time.perf_counter() + LEAD_S

    def serve(call: Call) -> None:
        while (i := waiting.get()) is not None:
            begun[i] = time.perf_counter() - origin
            refused[i] = _answered_in(call) is None
            done[i] = time.perf_counter() - origin

    def send() -> None:
        for i, at in enumerate(intended_s):
            entered[i] = _wait_until(origin + at) - origin
            waiting.put(i)
        stop()

    def stop() -> None:
        for _ in calls:
            waiting.put(None)

    cpu = time.process_time_ns()
    _run_threads([send, *(partial(serve, call) for call in calls)], stop)
    cpu_s = (time.process_time_ns() - cpu) * 1e-9
    return account(intended_s, entered if queued else begun, done, cpu_s, begun_s=begun, refused=refused)


def posting(post: Callable[[int, Callable[[], None]], None], intended_s: np.ndarray) -> Window:
    """An open loop whose requests are posted at their intended times, with no limit on the number in flight.

    `post(i, done)` sends request `i` without waiting for its answer, and has `done` called when the answer is there.
    """
    sent, done = (np.zeros(len(intended_s)) for _ in range(2))
    answered = threading.Semaphore(0)
    cpu, origin = time.process_time_ns(), time.perf_counter() + LEAD_S

    def record(i: int) -> None:
        done[i] = time.perf_counter() - origin
        answered.release()

    for i, at in enumerate(intended_s):
        sent[i] = _wait_until(origin + at) - origin
        post(i, partial(record, i))
    for _ in intended_s:
        answered.acquire()
    return account(intended_s, sent, done, (time.process_time_ns() - cpu) * 1e-9)


def account(
    intended_s: np.ndarray,
    sent_s: np.ndarray,
    done_s: np.ndarray,
    cpu_s: float,
    *,
    begun_s: np.ndarray | None = None,
    refused: np.ndarray | None = None,
) -> Window:
    """Arrivals as a window: latencies from the intended times, so that a stall counts for every request behind it.

    begun_s   when each call began, where it differs from the time of sending
    refused   bool [arrivals]: the requests that were refused, at `done_s`; default none
    """
    begun_s = sent_s if begun_s is None else begun_s
    answered = np.ones(len(done_s), bool) if refused is None else ~refused
    alone = answered & (begun_s >= _completed_before(begun_s, done_s))
    busy_s = done_s - np.maximum(sent_s, _completed_before(sent_s, done_s))
    return Window(
        samples_s=(done_s - intended_s)[answered].tolist(),
        wall_s=float(done_s.max()),
        cpu_s=cpu_s,
        refused=int((~answered).sum()),
        service_s=(done_s - sent_s)[answered].tolist(),
        alone_s=(done_s - begun_s)[alone].tolist(),
        busy_s=float(busy_s.clip(0).sum()),
        late=int((sent_s - intended_s > LATE_S).sum()),
    )


def _completed_before(entered_s: np.ndarray, done_s: np.ndarray) -> np.ndarray:
    """For each request, when the last of the requests before it was answered or refused; -inf for the first."""
    order = np.argsort(entered_s, kind="stable")
    latest = np.full(len(order), -np.inf)
    latest[order[1:]] = np.maximum.accumulate(done_s[order])[:-1]
    return latest


def goodput(window: Window, slo_s: float) -> float:
    """Requests a second that were answered within the SLO; refused requests are not among them."""
    return sum(sample <= slo_s for sample in window.samples_s) / window.wall_s


def _answered_in(call: Call) -> float | None:
    """The seconds until the answer, or None where a busy server refused the request."""
    sent = time.perf_counter_ns()
    try:
        call()
    except Overloaded:
        return None
    return (time.perf_counter_ns() - sent) * 1e-9


def _closed_loop(taken: Sequence[float | None], wall_ns: int, cpu_ns: int, device_s: Sequence[float] = ()) -> Window:
    """Times of the calls of closed loops as a window; None is a refused call."""
    samples = [each for each in taken if each is not None]
    refused = len(taken) - len(samples)
    return Window(
        samples_s=samples, wall_s=wall_ns * 1e-9, cpu_s=cpu_ns * 1e-9, refused=refused, device_s=list(device_s)
    )


def _wait_until(moment: float) -> float:
    """The perf_counter time after a sleep until `moment`."""
    if (pause := moment - time.perf_counter()) > 0:
        time.sleep(pause)
    return time.perf_counter()


def _run_threads(jobs: Sequence[Callable[[], None]], stop: Callable[[], None]) -> None:
    """Run each job in a thread; when one fails, `stop` ends the others and its error is raised here."""
    failures: list[SlipwayError] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except threading.BrokenBarrierError:
            pass  # another job failed before the start
        except SlipwayError as error:
            failures.append(error)
            stop()
        except FOREIGN as error:
            failures.append(EngineError(error_text(error)))
            stop()

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
