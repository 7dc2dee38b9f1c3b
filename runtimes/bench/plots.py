"""Plots of benchmark rows as SVG: every mark has its label beside it, and no file is loaded."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

import numpy as np

WIDTH = 760
LEFT, RIGHT, TOP, BOTTOM = 150, 120, 14, 40
LINE = 30  # height of an engine's line
INK, FAINT, GRID = "#1f2933", "#616e7c", "#e4e7eb"
COLOURS = {
    "torch": "#7b8794",
    "torch.compile": "#3e4c59",
    "onnx": "#2563a8",
    "openvino": "#0f8b7d",
    "triton": "#c2571a",
    "tensorrt": "#4d7c0f",
    "vllm": "#7c3aed",
    "optimum": "#a16207",
}
LABEL_PX = 13  # between the baselines of two labels


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One curve: name, kind (for the colour), and points (x, y, text beside the point)."""

    name: str
    kind: str
    points: Sequence[tuple[float, float, str]]
    ringed: int | None = None  # the index of a point with a ring around it


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A range of values on a range of pixels."""

    low: float
    high: float
    first_px: float
    last_px: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (log10(each) if self.logarithmic else each for each in (self.low, self.high, value))
        return self.first_px + (value - low) / (high - low) * (self.last_px - self.first_px)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.logarithmic else ticks(self.low, self.high)


def log_scale(values: Sequence[float], first_px: float, last_px: float) -> Scale:
    """A logarithmic scale with room around positive values."""
    low, high = min(values), max(values)
    room = max(1.12, (high / low) ** 0.06)
    return Scale(low=low / room, high=high * room, first_px=first_px, last_px=last_px, logarithmic=True)


def linear_scale(low: float, high: float, first_px: float, last_px: float) -> Scale:
    """A linear scale; an empty range is widened by 0.5 on both sides."""
    if high <= low:
        low, high = low - 0.5, high + 0.5
    return Scale(low=low, high=high, first_px=first_px, last_px=last_px)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within the range: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** floor(log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within the range; 2 and 5 times them where there are few."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), tuple(range(1, 10))):
        found = [factor * 10.0**power for power in powers for factor in factors]
        found = [value for value in found if low <= value <= high]
        if len(found) >= 3:
            break
    return found


def strips(lines: Sequence[tuple[str, str, Sequence[float], float | None]], unit: str) -> str:
    """The distribution of each (name, kind, samples, median) as a shape over a common logarithmic axis."""
    lines = [line for line in lines if line[3]]
    if not lines:
        return ""
    values = [value for _, _, samples, median in lines for value in (*_ends(samples), median) if value]
    x = log_scale(values, LEFT, WIDTH - RIGHT)
    height = TOP + LINE * len(lines) + BOTTOM
    body = [_x_axis(x, TOP, height - BOTTOM, unit)]
    for i, (name, kind, samples, median) in enumerate(lines):
        middle = TOP + LINE * (i + 0.5)
        body.append(_text(LEFT - 10, middle + 4, name, "end"))
        if len(samples):
            body.append(_violin(x, samples, middle, colour(kind)))
        assert median
        body.append(_line(x(median), middle - 10, x(median), middle + 10, INK, 2))
        body.append(_text(WIDTH - RIGHT + 10, middle + 4, figure(median), "start", FAINT))
    return svg(height, body)


def bars(lines: Sequence[tuple[str, str, float]], unit: str) -> str:
    """A bar from zero for each (name, kind, value)."""
    if not lines:
        return ""
    x = linear_scale(0, max(value for _, _, value in lines) * 1.02, LEFT, WIDTH - RIGHT)
    height = TOP + LINE * len(lines) + BOTTOM
    body = [_x_axis(x, TOP, height - BOTTOM, unit)]
    for i, (name, kind, value) in enumerate(lines):
        top = TOP + LINE * i + 6
        body.append(_text(LEFT - 10, top + 13, name, "end"))
        body.append(_rectangle(LEFT, top, x(value) - LEFT, LINE - 12, colour(kind)))
        body.append(_text(x(value) + 8, top + 13, figure(value), "start", FAINT))
    return svg(height, body)


def curves(series: Sequence[Series], x_unit: str, y_unit: str, *, linear_y: bool = False, height: int = 360) -> str:
    """Points joined by lines, on a logarithmic x; names stand at the ends."""
    series = [each for each in series if each.points]
    if not series:
        return ""
    x = log_scale([point[0] for each in series for point in each.points], 70, WIDTH - 150)
    ys = [point[1] for each in series for point in each.points]
    low, high = min(ys), max(ys)
    room = (high - low) * 0.08 or 0.01 * abs(high)
    y = linear_scale(low - room, high + room, height - BOTTOM, TOP) if linear_y else log_scale(ys, height - BOTTOM, TOP)
    body = [_x_axis(x, TOP, height - BOTTOM, x_unit), _y_axis(y, 70, WIDTH - 150, y_unit)]
    for each in series:
        body.extend(_curve(each, x, y))
    body.extend(_names(series, x, y))
    return svg(height, body)


def _curve(each: Series, x: Scale, y: Scale) -> Iterator[str]:
    places = [(x(a), y(b), text) for a, b, text in each.points]
    path = " ".join(f"{'M' if i == 0 else 'L'}{a:.1f} {b:.1f}" for i, (a, b, _) in enumerate(places))
    tint = colour(each.kind)
    yield f'<path d="{path}" fill="none" stroke="{tint}" stroke-width="1.6" stroke-linejoin="round"/>'
    for i, (a, b, text) in enumerate(places):
        yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.2" fill="{tint}"/>'
        if i == each.ringed:
            yield f'<circle cx="{a:.1f}" cy="{b:.1f}" r="7.5" fill="none" stroke="{tint}" stroke-width="1.6"/>'
        if text:
            yield _text(a, b - 9, text, "middle", FAINT, 10)


def _names(series: Sequence[Series], x: Scale, y: Scale) -> Iterator[str]:
    """A name beside the last point of each, moved down where two would overlap."""
    last = -float("inf")
    for each in sorted(series, key=lambda each: y(each.points[-1][1])):
        right, wanted, _ = each.points[-1]
        last = max(y(wanted) + 4, last + LABEL_PX)
        yield _text(x(right) + 11, last, each.name, "start", colour(each.kind))


def _violin(x: Scale, samples: Sequence[float], middle: float, tint: str) -> str:
    """The histogram of samples, mirrored; the largest bin is as high as the line."""
    low, high = _ends(samples)
    edges = np.linspace(x(low) - 1, x(high) + 1, 61)
    counts, _ = np.histogram([x(value) for value in samples], edges)
    heights = np.sqrt(counts / counts.max()) * (LINE / 2 - 4)  # the root, so that a tail is visible
    centres = (edges[:-1] + edges[1:]) / 2
    upper = " ".join(f"L{a:.1f} {middle - h:.1f}" for a, h in zip(centres, heights, strict=True))
    lower = " ".join(f"L{a:.1f} {middle + h:.1f}" for a, h in zip(centres[::-1], heights[::-1], strict=True))
    start = f"M{edges[0]:.1f} {middle:.1f}"
    return f'<path d="{start} {upper} L{edges[-1]:.1f} {middle:.1f} {lower} Z" fill="{tint}" fill-opacity="0.55"/>'


def _ends(samples: Sequence[float]) -> tuple[float, ...]:
    """The smallest and largest sample, or nothing."""
    return (min(samples), max(samples)) if len(samples) else ()


def _x_axis(x: Scale, top: float, bottom: float, unit: str) -> str:
    marks = [_line(x(tick), top, x(tick), bottom, GRID, 1) + _text(x(tick), bottom + 16, figure(tick), "middle", FAINT)
             for tick in x.ticks()]  # fmt: skip
    return "".join([*marks, _text((x.first_px + x.last_px) / 2, bottom + 33, unit, "middle", FAINT)])


def _y_axis(y: Scale, left: float, right: float, unit: str) -> str:
    marks = [_line(left, y(tick), right, y(tick), GRID, 1) + _text(left - 8, y(tick) + 4, figure(tick), "end", FAINT)
             for tick in y.ticks()]  # fmt: skip
    middle = (y.first_px + y.last_px) / 2
    turned = f'<g transform="translate(16 {middle:.1f}) rotate(-90)">{_text(0, 0, unit, "middle", FAINT)}</g>'
    return "".join([*marks, turned])


def colour(kind: str) -> str:
    return COLOURS.get(kind, "#9f1239")


def figure(value: float) -> str:
    """A number in three digits, without an exponent or trailing zeros."""
    if value == 0:
        return "0"
    digits = max(0, 2 - floor(log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def svg(height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}" role="img" '
        f'xmlns="http://www.w3.org/2000/svg">{"".join(body)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{stroke}" stroke-width="{width}"/>'


def _rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="2" fill="{fill}"/>'


def _text(x: float, y: float, text: str, anchor: str, fill: str = INK, size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" font-size="{size}">{escape(text)}</text>'
    )
