"""How load is put on an engine: one call after another, calls side by side, or arrivals that wait for nobody."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np

from runtimes.errors import FOREIGN, EngineError, Overloaded, SlipwayError, error_text

LATE_S = 1e-3  # a request sent this long after its intended time was late
LEAD_S = 0.005  # between the start of the clock and the first arrival
SCENARIOS = ("single-stream", "offline", "server", "concurrency")

Call = Callable[[], Any]


@dataclass(kw_only=True, slots=True)
class Window:
    """A stretch of load. `samples_s` are latencies of answers; for arrivals, from the intended time of sending.

    wall_s      from the first sending to the last answer
    cpu_s       CPU time of the calling process meanwhile, of all its threads
    refused     requests that a busy server refused; they have no sample
    device_s    time on the GPU between events around each call; empty where there is none

    Of arrivals only:

    rate_per_s  how many a second were intended
    service_s   latencies from the real time of sending
    alone_s     of calls that began while no other was under way, how long they took
    busy_s      how long at least one request was sent and not yet settled
    late        how many were sent more than LATE_S after their intended time
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


def one_by_one(call: Call, seconds: float, device_time: Callable[[], float] | None = None) -> Window:
    """Call after call for this long, and once at least (closed loop, one in flight).

    `device_time` is asked after each call, outside of its time, how long the GPU took for it.
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


def side_by_side(calls: Sequence[Call], seconds: float) -> Window:
    """Every call again and again in a thread of its own for this long (closed loop, len(calls) in flight).

    One that is refused is made again at once, so that as many stay in flight.
    """
    taken: list[list[float | None]] = [[] for _ in calls]
    together = threading.Barrier(len(calls))

    def lane(call: Call, own: list[float | None]) -> None:
        together.wait()
        end = time.perf_counter_ns() + int(seconds * 1e9)
        while not own or time.perf_counter_ns() < end:
            own.append(_answered_in(call))

    cpu, started = time.process_time_ns(), time.perf_counter_ns()
    _run_lanes([partial(lane, *each) for each in zip(calls, taken, strict=True)], together.abort)
    wall, cpu = time.perf_counter_ns() - started, time.process_time_ns() - cpu
    return _closed_loop([each for own in taken for each in own], wall, cpu)


def poisson_arrivals(rate_per_s: float, seconds: float, seed: Sequence[int]) -> np.ndarray:
    """Intended times of sending in seconds, float64 [arrivals], one at least; the same for the same seed."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1 / rate_per_s, max(1, int(2 * rate_per_s * seconds) + 50))
    times = np.cumsum(gaps)
    return times[: max(1, int(np.searchsorted(times, seconds)))]


def arriving(calls: Sequence[Call], intended_s: np.ndarray, *, queued: bool) -> Window:
    """Requests sent at their intended times, whether the ones before are answered or not (open loop).

    Each of `calls` takes one request at a time. With `queued` the queue before them belongs to what is measured, and a
    request is sent when it enters it: an engine in this process. Without, it is sent when a call begins: a server has
    its own queue, and what waits here for a free call is late.
    """
    entered, begun, done = (np.zeros(len(intended_s)) for _ in range(3))
    refused = np.zeros(len(intended_s), bool)
    waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    origin = time.perf_counter() + LEAD_S

    def lane(call: Call) -> None:
        while (i := waiting.get()) is not None:
            begun[i] = time.perf_counter() - origin
            refused[i] = _answered_in(call) is None
            done[i] = time.perf_counter() - origin

    def send() -> None:
        for i, at in enumerate(intended_s):
            entered[i] = _wait_until(origin + at) - origin
            waiting.put(i)
        let_go()

    def let_go() -> None:
        for _ in calls:
            waiting.put(None)

    cpu = time.process_time_ns()
    _run_lanes([send, *(partial(lane, call) for call in calls)], let_go)
    cpu_s = (time.process_time_ns() - cpu) * 1e-9
    return account(intended_s, entered if queued else begun, done, cpu_s, begun_s=begun, refused=refused)


def posting(post: Callable[[int, Callable[[], None]], None], intended_s: np.ndarray) -> Window:
    """Requests posted at their intended times, however many are on their way already (open loop).

    `post` sends request `i` without waiting for its answer, and sees to it that what it was given is called then.
    """
    sent, done = (np.zeros(len(intended_s)) for _ in range(2))
    mask_near_ties = threading.Semaphore(0)
    cpu, origin = time.process_time_ns(), time.perf_counter() + LEAD_S

    def resolve_config(i: int) -> None:
        done[i] = time.perf_counter() - origin
        mask_near_ties.release()

    for i, at in enumerate(intended_s):
        sent[i] = _wait_until(origin + at) - origin
        post(i, partial(resolve_config, i))
    for _ in intended_s:
        mask_near_ties.acquire()
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
    """Arrivals as a window: latencies from the intended times, so that a stall counts for all who had to wait.

    begun_s   when each call began, where that is not when it was sent
    refused   bool [arrivals]: which were refused, at `done_s`; none if left out
    """
    begun_s = sent_s if begun_s is None else begun_s
    answered = np.ones(len(done_s), bool) if refused is None else ~refused
    alone = answered & (begun_s >= _settled_before(begun_s, done_s))
    busy_s = done_s - np.maximum(sent_s, _settled_before(sent_s, done_s))
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


def _settled_before(entered_s: np.ndarray, done_s: np.ndarray) -> np.ndarray:
    """When the last of all who had entered before each was done; -inf for the first."""
    order = np.argsort(entered_s, kind="stable")
    latest = np.full(len(order), -np.inf)
    latest[order[1:]] = np.maximum.accumulate(done_s[order])[:-1]
    return latest


def goodput(window: Window, bound_s: float) -> float:
    """Requests a second that were answered within the bound; one that was refused was not."""
    return sum(sample <= bound_s for sample in window.samples_s) / window.wall_s


def _answered_in(call: Call) -> float | None:
    """How many seconds the answer took, or None where a busy server refused to give one."""
    sent = time.perf_counter_ns()
    try:
        call()
    except Overloaded:
        return None
    return (time.perf_counter_ns() - sent) * 1e-9


def _closed_loop(taken: Sequence[float | None], wall_ns: int, cpu_ns: int, device_s: Sequence[float] = ()) -> Window:
    """Calls that waited for each other as a window; None was refused."""
    samples = [each for each in taken if each is not None]
    refused = len(taken) - len(samples)
    return Window(
        samples_s=samples, wall_s=wall_ns * 1e-9, cpu_s=cpu_ns * 1e-9, refused=refused, device_s=list(device_s)
    )


def _wait_until(moment: float) -> float:
    """The time, as perf_counter tells it, once `moment` has come."""
    if (pause := moment - time.perf_counter()) > 0:
        time.sleep(pause)
    return time.perf_counter()


def _run_lanes(lanes: Sequence[Callable[[], None]], let_go: Callable[[], None]) -> None:
    """Run all side by side; once one fails, the others are let go and its error is raised here."""
    failures: list[SlipwayError] = []

    def guarded(lane: Callable[[], None]) -> None:
        try:
            lane()
        except threading.BrokenBarrierError:
            pass  # another failed before the start
        except SlipwayError as error:
            failures.append(error)
            let_go()
        except FOREIGN as error:
            failures.append(EngineError(error_text(error)))
            let_go()

    threads = [threading.Thread(target=guarded, args=(lane,), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
