"""Plots: marks where the values are, readable ticks, SVG that a parser takes."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from runtimes.bench.plots import (
    LABEL_PX,
    Series,
    bars,
    curves,
    figure,
    linear_scale,
    log_scale,
    log_ticks,
    strips,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


def texts(drawn: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(drawn).iter(f"{SVG}text"))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.9, [0, 0.2, 0.4, 0.6, 0.8]),
        (-3, 4, [-2, 0, 2, 4]),
        (98, 101, [98, 98.5, 99, 99.5, 100, 100.5, 101]),
    ],
)
def test_ticks_are_round_and_within_the_range(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.5, 2000, [1, 10, 100, 1000]), (0.9, 60, [1, 2, 5, 10, 20, 50]), (1.5, 4.2, [2, 3, 4])],
)
def test_logarithmic_ticks_are_powers_or_few_digits(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


def test_a_logarithmic_scale_gives_each_factor_the_same_room() -> None:
    scale = log_scale([1.0, 100.0], 0, 300)
    assert scale(10) - scale(1) == pytest.approx(scale(100) - scale(10))
    assert 0 < scale(1) < scale(100) < 300
    assert linear_scale(2.0, 2.0, 0, 10)(2.0) == 5, "a range of nothing has its value in the middle"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.06912, "0.0691"), (1.0, "1"), (15.37, "15.4"), (1002.4, "1,002"), (-2.5, "-2.5")]
)
def test_a_figure_has_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_a_strip_shows_every_engine_with_its_median() -> None:
    samples = np.random.default_rng(0).lognormal(0, 0.3, 500).tolist()
    drawn = strips([("onnx <int8>", "onnx", samples, 1.0), ("torch", "torch", [], 2.5), ("none", "x", [], None)], "ms")
    found = [each.text for each in texts(drawn)]
    assert {"onnx <int8>", "1", "torch", "2.5"} <= set(found)
    assert "none" not in found, "an engine without a median has no place"


def test_a_bar_is_as_long_as_its_value() -> None:
    drawn = ElementTree.fromstring(bars([("a", "onnx", 50.0), ("b", "torch", 100.0)], "MB"))
    short, long = (float(each.attrib["width"]) for each in drawn.iter(f"{SVG}rect"))
    assert long == pytest.approx(2 * short, abs=0.2)


def test_names_of_curves_that_end_together_do_not_overlap() -> None:
    series = [Series(name=f"engine {i}", kind="onnx", points=[(1.0, 1.0, "1"), (10.0, 2.0, "2")]) for i in range(4)]
    named = [
        float(each.attrib["y"]) for each in texts(curves(series, "rows/s", "ms")) if (each.text or "")[:3] == "eng"
    ]
    assert len(named) == 4
    assert min(np.diff(sorted(named))) >= LABEL_PX - 0.1


def test_the_ringed_point_of_a_curve_has_a_second_circle() -> None:
    points = [(1.0, 1.0, "1"), (10.0, 2.0, "2")]
    plain, ringed = (curves([Series(name="a", kind="onnx", points=points, ringed=i)], "x", "y") for i in (None, 1))
    assert ringed.count("<circle") == plain.count("<circle") + 1 == 3


def test_nothing_to_show_is_nothing() -> None:
    assert strips([], "ms") == bars([], "MB") == curves([], "x", "y") == ""
