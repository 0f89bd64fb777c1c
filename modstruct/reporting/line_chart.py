"""A line chart as SVG text: no script, colours from the page's style, values as tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from modstruct.reporting.vocabulary import shown

Scale = Literal["linear", "log"]
WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
MARKED_POINTS = 24
"""Longest line whose points are marked."""
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
STYLES = 8
"""Colours, marks and dashes of the style sheet; a ninth run repeats the first."""


@dataclass(frozen=True)
class Series:
    """One line. style: number of the run, which gives its colour and mark. low, high: intervals, as long as y."""

    name: str
    style: int
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()


@dataclass(frozen=True)
class Axis:
    """An axis from low to high. ticks: the values that are labelled."""

    label: str
    scale: Scale
    low: float
    high: float
    ticks: tuple[float, ...]
    share: bool = False

    def place(self, value: float) -> float:
        """From 0 at the low end to 1 at the high end."""
        if self.scale == "log":
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def named(self, value: float) -> str:
        if self.share:
            return f"{100 * value:.4g}".replace("-", "\u2212")
        exponent = math.log10(value) if self.scale == "log" else 0.0
        if abs(exponent - round(exponent)) < 1e-9 and not -3 < exponent < 5:
            return f"10{str(round(exponent)).translate(SUPERSCRIPTS)}"
        return f"{value:.4g}".replace("-", "\u2212")


def line_chart(
    title: str,
    x_label: str,
    y_label: str,
    series: Sequence[Series],
    x_scale: Scale = "linear",
    y_scale: Scale = "linear",
    share: bool = False,
    x_ticks: Sequence[float] = (),
) -> Markup:
    """Lines of several runs in one frame, about as wide as a phone.

    share: y is a share and is shown in percent. x_ticks: values to label on the x axis, by default round numbers. On a
    logarithmic axis values that are not positive are left out. Raises ValueError if no point is left.
    """
    kept = [_kept(one, x_scale, y_scale) for one in series]
    points = [point for one in kept for point in one]
    if not points:
        raise ValueError(f"chart {title!r}: no point can be drawn")
    bounds = [value for _, y, low, high in points for value in (y, low, high) if value is not None]
    x = _axis(x_label, x_scale, [point[0] for point in points], ticks=x_ticks)
    y = _axis(y_label, y_scale, bounds, share=share, padded=True)
    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            WIDTH, HEIGHT, f"{title}: {y_label} over {x_label}, {_described(series, kept, share)}"
        ),
        _frame(x, y),
    ]
    parts += [_line(one, of_one, x, y, share, x_label) for one, of_one in zip(series, kept, strict=True) if of_one]
    return Markup("").join([*parts, Markup("</svg>")])


def mark(style: int, x: float, y: float, size: float = 3.4) -> Markup:
    """The mark of a run, which differs by shape as well as by colour."""
    shape = style % 4
    if shape == 0:
        return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(x, y, size)
    if shape == 1:
        return Markup('<rect x="{:.1f}" y="{:.1f}" width="{w:.1f}" height="{w:.1f}"/>').format(
            x - 0.9 * size, y - 0.9 * size, w=1.8 * size
        )
    s = 1.3 * size
    corners = (
        ((x, y - s), (x + s, y + 0.8 * s), (x - s, y + 0.8 * s))
        if shape == 2
        else ((x, y - s), (x + s, y), (x, y + s), (x - s, y))
    )
    return Markup('<polygon points="{}"/>').format(" ".join(f"{a:.1f},{b:.1f}" for a, b in corners))


def _kept(one: Series, x_scale: Scale, y_scale: Scale) -> list[tuple[float, float, float | None, float | None]]:
    nothing = [None] * len(one.y)
    rows = zip(one.x, one.y, one.low or nothing, one.high or nothing, strict=True)

    def drawn(x: float, y: float) -> bool:
        return (x_scale == "linear" or x > 0) and (y_scale == "linear" or y > 0)

    return [
        (x, y, *((None, None) if low is None or high is None or not drawn(x, low) else (low, high)))
        for x, y, low, high in rows
        if drawn(x, y)
    ]


def _axis(
    label: str,
    scale: Scale,
    values: Sequence[float],
    ticks: Sequence[float] = (),
    share: bool = False,
    padded: bool = False,
) -> Axis:
    low, high = min(values), max(values)
    if scale == "log":
        if low == high:
            low, high = low / 2, high * 2
        if padded:
            low, high = low / 1.15, high * 1.15
        return Axis(label, scale, low, high, tuple(ticks) or _log_ticks(low, high), share)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = _step(high - low)
    if padded:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    first = math.ceil(low / step - 1e-9)
    return Axis(
        label,
        scale,
        low,
        high,
        tuple(ticks) or tuple(round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)),
        share,
    )


def _step(span: float, wanted: int = 5) -> float:
    """The round step (1, 2 or 5 times a power of ten) that divides the span into about `wanted` parts."""
    power = 10 ** math.floor(math.log10(span / wanted))
    return min((1, 2, 5, 10), key=lambda m: abs(span / (m * power) - wanted)) * power


def _log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Round numbers: powers of ten, or more of each decade if these are too few, at most six."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**d for d in decades for m in digits if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            return tuple(ticks[:: math.ceil(len(ticks) / 6)])
    step = _step(high - low, 4)
    return tuple(round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1))


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _frame(x: Axis, y: Axis) -> Markup:
    floor, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y.ticks:
        place = _y(y, tick)
        parts.append(Markup('<path class="grid" d="M{} {p:.1f}H{}"/>').format(LEFT, right, p=place))
        parts.append(
            Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(
                LEFT - 6, place + 3.5, y.named(tick)
            )
        )
    parts.append(Markup('<path class="axis" d="M{} {f}H{}"/>').format(LEFT, right, f=floor))
    for tick in x.ticks:
        place = _x(x, tick)
        parts.append(Markup('<path class="axis" d="M{p:.1f} {}v4"/>').format(floor, p=place))
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                place, floor + 16, x.named(tick)
            )
        )
    parts.append(
        Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (LEFT + right) / 2, HEIGHT - 5, x.label
        )
    )
    unit = f"{y.label}, %" if y.share else y.label
    parts.append(
        Markup('<text class="label" transform="translate(11 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (TOP + floor) / 2, unit
        )
    )
    return Markup("").join(parts)


def _line(one: Series, points: list, x: Axis, y: Axis, share: bool, x_label: str) -> Markup:
    places = [(_x(x, point[0]), _y(y, point[1])) for point in points]
    parts = [Markup('<g class="run run-{}">').format(one.style % STYLES)]
    band = [(place, low, high) for (place, _), (_, _, low, high) in zip(places, points, strict=True) if low is not None]
    if len(band) > 1:
        edge = [(a, _y(y, high)) for a, _, high in band] + [(a, _y(y, low)) for a, low, _ in reversed(band)]
        parts.append(Markup('<polygon class="band" points="{}"/>').format(_joined(edge)))
    line = Markup('<polyline points="{}"><title>{}</title></polyline>')
    parts.append(line.format(_joined(places), one.name))
    if len(points) <= MARKED_POINTS:
        unit = " %" if share else ""
        for (a, b), (x_value, value, low, high) in zip(places, points, strict=True):
            interval = "" if low is None else f" [{shown(low, share)}, {shown(high, share)}]"
            text = f"{one.name}: {shown(value, share)}{unit}{interval} at {x_label} = {x.named(x_value)}"
            parts.append(Markup("<g>{}<title>{}</title></g>").format(mark(one.style, a, b), text))
    return Markup("").join([*parts, Markup("</g>")])


def _joined(places: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in places)


def _described(series: Sequence[Series], kept: Sequence[list], share: bool) -> str:
    """For readers who cannot see the lines: where each begins and ends."""
    unit = " %" if share else ""
    return "; ".join(
        f"{one.name} from {shown(points[0][1], share)} to {shown(points[-1][1], share)}{unit}"
        for one, points in zip(series, kept, strict=True)
        if points
    )
