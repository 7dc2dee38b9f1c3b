"""What each scenario measures: a list of points, each with its sizes and its load."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runtimes.artifact import Artifact
from runtimes.bench import wire
from runtimes.bench.load import SCENARIOS
from runtimes.bench.measure import Sizes
from runtimes.bench.statistics import STEADY_WINDOWS
from runtimes.tensors import BATCH

CAPACITY_SHARES = (0.5, 0.8)  # of the throughput of an engine in a closed loop
ARRIVALS = 30  # in a window of the server scenario, at least


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How long and how often.

    seconds      length of a window
    windows      of every engine at every point; points of a sweep take a third of them
    max_windows  of an engine that is not yet stable
    runs         repetitions of everything, each with new processes
    rates        of arrivals, per second; empty: shares of the capacity of each engine
    slo_s        latency within which an answer counts for goodput
    concurrency  requests in flight, for the concurrency sweep
    """

    seconds: float = 0.2
    windows: int = 10
    max_windows: int = 30
    runs: int = 1
    rates: Sequence[float] = ()
    slo_s: float = 0.1
    concurrency: Sequence[int] = (1, 2, 4, 8, 16)

    @property
    def sweep_windows(self) -> tuple[int, int]:
        """Least and most windows of a point of a sweep."""
        return max(STEADY_WINDOWS, self.windows // 3), max(STEADY_WINDOWS, self.max_windows // 3)


class Load(Protocol):
    """One kind of load. `capacity_per_s` is that of the contestant in a closed loop, 1 where it is not known."""

    def request(self, window: int, capacity_per_s: float) -> wire.Request:
        """The request to a worker for its window with this index."""

    def columns(self, capacity_per_s: float) -> dict[str, Any]:
        """What sets the row apart from other rows of the same scenario and sizes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClosedLoop:
    """One request in flight."""

    seconds: float

    def request(self, window: int, capacity_per_s: float) -> wire.Request:
        return wire.closed_loop(self.seconds)

    def columns(self, capacity_per_s: float) -> dict[str, Any]:
        return {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Concurrent:
    """`concurrency` requests in flight."""

    concurrency: int
    seconds: float

    def request(self, window: int, capacity_per_s: float) -> wire.Request:
        return wire.concurrent(self.concurrency, self.seconds)

    def columns(self, capacity_per_s: float) -> dict[str, Any]:
        return {"lanes": self.concurrency}  # the key of results files


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenLoop:
    """Poisson arrivals at `rate_per_s`, or at `share` of the capacity of each contestant.

    Contestants with the same rate have the same arrivals. A window has ARRIVALS or more on average.
    """

    rate_per_s: float | None = None
    share: float | None = None
    seconds: float
    slo_s: float

    def request(self, window: int, capacity_per_s: float) -> wire.Request:
        rate_per_s = self.rate_of(capacity_per_s)
        return wire.open_loop(rate_per_s, max(self.seconds, ARRIVALS / rate_per_s), [0, window])

    def columns(self, capacity_per_s: float) -> dict[str, Any]:
        return {"rate_per_s": self.rate_of(capacity_per_s), "bound_s": self.slo_s}

    def rate_of(self, capacity_per_s: float) -> float:
        if self.rate_per_s is not None:
            return self.rate_per_s
        assert self.share is not None
        return self.share * capacity_per_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """All contestants at these sizes under this load, in `windows` windows each, up to `max_windows` until stable.

    new_processes      the contestants are opened anew for this point
    measures_capacity  the point has no row: it gives the capacity that the loads of later points refer to
    """

    scenario: str
    sizes: Sizes
    load: Load
    windows: int
    max_windows: int
    new_processes: bool = False
    measures_capacity: bool = False


def single_stream(artifact: Artifact, settings: Settings) -> list[Point]:
    """One request in flight, at the sizes of a request and at the opt sizes, each in new processes."""
    return [
        Point(
            scenario="single-stream",
            sizes=sizes,
            load=ClosedLoop(seconds=settings.seconds),
            windows=settings.windows,
            max_windows=settings.max_windows,
            new_processes=True,
        )
        for sizes in (request_sizes(artifact), artifact.signature.sizes("opt"))
    ]


def offline(artifact: Artifact, settings: Settings) -> list[Point]:
    """Throughput at each batch size."""
    opt, load = artifact.signature.sizes("opt"), ClosedLoop(seconds=settings.seconds)
    return [_sweep_point("offline", {**opt, BATCH: batch}, load, settings) for batch in batches(artifact)]


def server(artifact: Artifact, settings: Settings) -> list[Point]:
    """Poisson arrivals of single requests, at the given rates or at shares of the capacity of each engine.

    The first point measures the capacity, in one window of a closed loop.
    """
    sizes, common = request_sizes(artifact), {"seconds": settings.seconds, "slo_s": settings.slo_s}
    loads = [OpenLoop(rate_per_s=rate, **common) for rate in settings.rates]
    loads = loads or [OpenLoop(share=share, **common) for share in CAPACITY_SHARES]
    capacity = Point(
        scenario="server",
        sizes=sizes,
        load=ClosedLoop(seconds=settings.seconds),
        windows=1,
        max_windows=1,
        measures_capacity=True,
    )
    return [capacity, *(_sweep_point("server", sizes, load, settings) for load in loads)]


def concurrency(artifact: Artifact, settings: Settings) -> list[Point]:
    """More and more requests in flight, in threads of one process or of a client."""
    sizes = request_sizes(artifact)
    loads = [Concurrent(concurrency=count, seconds=settings.seconds) for count in settings.concurrency]
    return [_sweep_point("concurrency", sizes, load, settings) for load in loads]


PLANS: Mapping[str, Callable[[Artifact, Settings], list[Point]]] = dict(
    zip(SCENARIOS, (single_stream, offline, server, concurrency), strict=True)
)


def request_sizes(artifact: Artifact) -> dict[str, int]:
    """The sizes of one request: for a recurrent model a single step, else every axis but the batch at its opt."""
    return {**artifact.signature.sizes("min" if artifact.signature.state else "opt"), BATCH: 1}


def batches(artifact: Artifact) -> list[int]:
    """Powers of two times the smallest batch size, and the largest batch size."""
    axis = artifact.signature.axis(BATCH)
    doubled = [axis.min * 2**i for i in range(axis.max.bit_length())]
    return [*(batch for batch in doubled if batch < axis.max), axis.max]


def _sweep_point(scenario: str, sizes: Sizes, load: Load, settings: Settings) -> Point:
    windows, max_windows = settings.sweep_windows
    return Point(scenario=scenario, sizes=sizes, load=load, windows=windows, max_windows=max_windows)
