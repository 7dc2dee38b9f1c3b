"""Interleaved runs: the order of windows and processes, the capacity of an open loop, the points of every plan."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from runtimes.bench import interleave
from runtimes.bench.interleave import InterleavedRuns, Subject, sessions
from runtimes.bench.load import Window
from runtimes.bench.plan import PLANS, ClosedLoop, OpenLoop, Point, Settings
from tests.runtimes.bench.measured import STEP, TOY, measurement
from tests.toys import DOUBLING

DOUBLING_ARTIFACT: Any = SimpleNamespace(signature=DOUBLING)


class Stub:
    """A contestant without a process. Its first window takes twice as long; `log` has every call."""

    log: ClassVar[list[tuple[str, str, Any]]] = []
    opened = 0

    def __init__(self, subject: Subject, sampler: object) -> None:
        self.subject, self.result = subject, measurement([])
        Stub.log.append(("open", subject.label, Stub.opened))
        Stub.opened += 1

    @property
    def capacity_per_s(self) -> float:
        return {"a": 10.0, "b": 20.0}[self.subject.label]

    def prepare(self, sizes: Mapping[str, int]) -> None:
        self.result = measurement([])
        Stub.log.append(("prepare", self.subject.label, dict(sizes)))

    def window(self, load: Mapping[str, Any]) -> None:
        seconds = 1.0 if self.result.windows else 2.0
        self.result.windows.append(Window(samples_s=[seconds] * 9, wall_s=9 * seconds, cpu_s=0))
        Stub.log.append(("window", self.subject.label, dict(load)))

    def close(self) -> None:
        Stub.log.append(("close", self.subject.label, None))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[Subject]:
    """Two subjects whose contestants are stubs."""
    monkeypatch.setattr(interleave, "Contestant", Stub)
    monkeypatch.setattr(Stub, "log", [])
    monkeypatch.setattr(Stub, "opened", 0)
    return [Subject(artifact=TOY, root=Path(), label=label) for label in "ab"]


def points(*changes: Mapping[str, Any]) -> list[Point]:
    common = {"scenario": "offline", "sizes": STEP, "load": ClosedLoop(seconds=1.0), "windows": 3, "max_windows": 3}
    return [Point(**{**common, **change}) for change in changes]


def measured_order(kind: str = "window") -> str:
    return "".join(label for act, label, _ in Stub.log if act == kind)


@pytest.mark.parametrize(("windows", "most", "expected"), [(2, 9, 4), (2, 3, 3), (6, 9, 6)])
def test_an_engine_has_windows_until_it_is_stable_or_has_had_the_most(
    windows: int, most: int, expected: int, two: list[Subject]
) -> None:
    """The first window is twice as slow: four windows end in three alike."""
    ((row,),) = InterleavedRuns(two[:1], sampler=None).rows(points({"windows": windows, "max_windows": most}))  # type: ignore[arg-type]
    assert len(row["windows"]) == len(row["counted"]) == expected
    assert row["counted"][0] is (expected < 4), "windows before the steady stretch do not count"
    assert row["stable"] is (expected >= 4)


def test_windows_alternate_and_each_contestant_is_first_as_often(two: list[Subject]) -> None:
    list(InterleavedRuns(two, sampler=None).rows(points({}, {"windows": 1, "max_windows": 1})))  # type: ignore[arg-type]
    assert measured_order() == "abbaab" + "ab"
    assert measured_order("open") == "ab", "points share processes"


def test_every_run_and_every_point_with_new_processes_opens_the_contestants_anew(two: list[Subject]) -> None:
    plan = points({"new_processes": True}, {"new_processes": True}, {})
    assert [len(session) for session in sessions(plan)] == [1, 2]
    rows = list(InterleavedRuns(two, sampler=None, runs=2).rows(plan))  # type: ignore[arg-type]
    assert (measured_order("open"), measured_order("close")) == ("ab" * 4, "ba" * 4)
    assert [len(by_engine) for by_engine in rows] == [2, 2, 2]
    assert all(len(row["windows"]) == 6 for by_engine in rows for row in by_engine), "both runs are in one row"


def test_an_open_loop_measures_the_capacity_of_each_engine_first(two: list[Subject]) -> None:
    """Its first point has one window and no row; the rates are shares of the capacity, with the same seed for both."""
    plan = PLANS["server"](DOUBLING_ARTIFACT, Settings(seconds=0.5, windows=9, max_windows=9))
    assert [point.measures_capacity for point in plan] == [True, False, False]
    assert (plan[0].windows, plan[0].max_windows) == (1, 1)
    rows = list(InterleavedRuns(two, sampler=None).rows(plan))  # type: ignore[arg-type]
    assert [[row["rate_per_s"] for row in by_engine] for by_engine in rows] == [[5.0, 10.0], [8.0, 16.0]]
    assert {row["bound_s"] for by_engine in rows for row in by_engine} == {0.1}
    loads = [load for act, _, load in Stub.log if act == "window"]
    assert loads[0] == loads[1] == {"do": "one_by_one", "seconds": 0.5}
    assert loads[2:5] == [
        {"do": "arriving", "rate_per_s": 5.0, "seconds": 6.0, "seed": [0, 0]},
        {"do": "arriving", "rate_per_s": 10.0, "seconds": 3.0, "seed": [0, 0]},
        {"do": "arriving", "rate_per_s": 10.0, "seconds": 3.0, "seed": [0, 1]},
    ]


def test_plans_have_the_points_of_their_scenario() -> None:
    settings = Settings(windows=10, max_windows=30, rates=(7.0,), concurrency=(1, 4), slo_s=0.2)
    found = {name: plan(DOUBLING_ARTIFACT, settings) for name, plan in PLANS.items()}
    single = found["single-stream"]
    assert [point.sizes for point in single] == [{"batch": 1, "time": 4}, {"batch": 2, "time": 4}]
    assert [(point.windows, point.max_windows, point.new_processes) for point in single] == [(10, 30, True)] * 2
    assert [point.sizes["batch"] for point in found["offline"]] == [1, 2, 4, 8]
    assert {(point.windows, point.max_windows) for point in found["offline"]} == {(3, 10)}
    assert [point.load.columns(1.0) for point in found["concurrency"]] == [{"lanes": 1}, {"lanes": 4}]
    assert found["server"][1].load == OpenLoop(rate_per_s=7.0, seconds=0.2, slo_s=0.2)
    assert not any(point.measures_capacity for name in found if name != "server" for point in found[name])
