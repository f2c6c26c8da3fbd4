# SPDX-License-Identifier: Apache-2.0
"""Charts as inline SVG: lines, stacked bars, stacked areas, points with names, heat maps.

Written here and not taken from a library, for three reasons: a report has to be made in seconds
(Matplotlib takes one to be imported and one for six charts), to hold in a few hundred kilobytes
with nothing to fetch (the JavaScript of plotting libraries alone is 1 to 5 MB), and to follow the
reader's light or dark theme. So colours are CSS classes (``s0`` to ``s9``), texts stay texts, and
every mark has a ``<title>`` that a browser shows when the pointer rests on it.

Every function returns an ``<svg>`` element; sizes are in its own units, 12 of which are the height
of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Area",
    "Axis",
    "Bar",
    "Line",
    "Point",
    "area_chart",
    "bar_chart",
    "heat_map",
    "line_chart",
    "number",
    "point_chart",
    "ticks",
]

WIDTH = 720.0
CHARACTER = 7.2
"""Width of a character of 12 units, a little more than the mean of the usual fonts."""
LINE = 15.0
RIGHT, TOP, BOTTOM = 18.0, 14.0, 46.0


@dataclass(frozen=True)
class Axis:
    """What an axis says, and the range it shows: of the data where ``low`` or ``high`` is None."""

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True)
class Line:
    """A line through points; with ``marks`` every point has a dot, and ``dashed`` lines are
    told apart without colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    marks: bool = False
    dashed: bool = False
    steps: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar of parts, one after the other: (name of the part, length, colour)."""

    name: str
    parts: Sequence[tuple[str, float, int]]
    below: Sequence[tuple[str, float, int]] = ()
    """Parts of a thinner bar under it, on the same axis."""


@dataclass(frozen=True)
class Area:
    """A layer of a stacked area: its height at each x."""

    name: str
    y: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Point:
    """A named point; ``front`` points are joined by a line."""

    name: str
    x: float
    y: float
    colour: int
    front: bool = False
    text: str | None = None
    """Shown beside the point; by default its name, nothing where it is empty."""


# Numbers -------------------------------------------------------------------------------------


def number(value: float, digits: int = 4) -> str:
    """A number for people: ``digits`` significant digits, thousands apart, no trailing zeros."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.{digits - 1}g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """Round numbers from ``low`` to ``high``: 1, 2 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, most)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    marks = (1, 2, 5) if last - first <= 2 else (1,)
    every = [m * 10.0**n for n in range(first, last + 1) for m in marks]
    return [t for t in every if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]


@dataclass(frozen=True)
class _Scale:
    """Maps values to positions."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low))
        return self.begin + (self.end - self.begin) * (value - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, most)


def _range(axis: Axis, values: Sequence[float], *, pad: float = 0.0) -> tuple[float, float]:
    """The range that an axis shows."""
    seen = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)] or [1.0]
    low = axis.low if axis.low is not None else min(seen)
    high = axis.high if axis.high is not None else max(seen)
    if axis.log:
        if high <= low:
            return low / 2, low * 2
        spread = (high / low) ** pad
        return (
            low if axis.low is not None else low / spread,
            high if axis.high is not None else high * spread,
        )
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        return (low if axis.low is not None else low - margin), low + margin
    margin = (high - low) * pad
    return (
        low if axis.low is not None else low - margin,
        high if axis.high is not None else high + margin,
    )


# Pieces --------------------------------------------------------------------------------------


def _at(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _text(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "tick") -> str:
    return (
        f'<text class="{kind}" x="{_at(x)}" y="{_at(y)}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _svg(height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {_at(WIDTH)} {_at(height)}" role="img" aria-label="{escape(label)}">'
        + "".join(body)
        + "</svg>"
    )


def _axes(
    x: _Scale, y: _Scale, x_label: str, y_label: str, *, percent: bool = False
) -> tuple[list[str], Callable[[float], str]]:
    """Grid, ticks and names of two numeric axes."""
    body = []

    def y_text(value: float) -> str:
        return f"{value * 100:g} %" if percent else number(value)

    room = abs(x.end - x.begin)
    marks = x.ticks(max(2, int(room / 80)))
    # No more ticks than there is room for their texts.
    widest = max((len(number(t)) for t in marks), default=1) * CHARACTER + 12
    skip = max(1, math.ceil(widest * len(marks) / max(room, 1)))
    for value in marks[::skip]:
        at = x(value)
        body.append(f'<path class="grid" d="M{_at(at)} {_at(y.begin)}V{_at(y.end)}"/>')
        body.append(_text(at, y.begin + 16, number(value), anchor="middle"))
    for value in y.ticks(6):
        at = y(value)
        body.append(f'<path class="grid" d="M{_at(x.begin)} {_at(at)}H{_at(x.end)}"/>')
        body.append(_text(x.begin - 7, at + 4, y_text(value), anchor="end"))
    body.append(
        f'<path class="axis" d="M{_at(x.begin)} {_at(y.end)}V{_at(y.begin)}H{_at(x.end)}"/>'
    )
    body.append(_text((x.begin + x.end) / 2, y.begin + 38, x_label, anchor="middle", kind="label"))
    middle = (y.begin + y.end) / 2
    body.append(
        f'<text class="label" transform="translate(13 {_at(middle)}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    return body, y_text


def _plane(
    x_axis: Axis,
    y_axis: Axis,
    xs: Sequence[float],
    ys: Sequence[float],
    height: float,
    *,
    percent: bool,
    pad: float = 0.0,
) -> tuple[_Scale, _Scale, list[str]]:
    x_low, x_high = _range(x_axis, xs, pad=pad)
    y_low, y_high = _range(y_axis, ys, pad=max(pad, 0.04))
    y = _Scale(y_low, y_high, height - BOTTOM, TOP, y_axis.log)
    texts = [f"{t * 100:g} %" if percent else number(t) for t in y.ticks(6)]
    left = 30 + max((len(t) for t in texts), default=1) * CHARACTER
    x = _Scale(x_low, x_high, left, WIDTH - RIGHT, x_axis.log)
    body, _ = _axes(x, y, x_axis.label, y_axis.label, percent=percent)
    return x, y, body


# Charts --------------------------------------------------------------------------------------


def line_chart(
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    *,
    percent: bool = False,
    marks: Sequence[tuple[float, float, int, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    height: float = 300.0,
) -> str:
    """Lines over two numeric axes.

    Parameters
    ----------
    marks : sequence of (x, y, colour, text)
        Rings, with what the pointer shows on them.
    levels : sequence of (y, text)
        Dashed lines across, with a text at their right end.
    percent : bool
        y is a share, shown in per cent.
    """
    xs = [v for line in lines for v in line.x] + [m[0] for m in marks]
    ys = [v for line in lines for v in line.y] + [m[1] for m in marks]
    x, y, body = _plane(x_axis, y_axis, xs, ys, height, percent=percent)
    for value, text in levels:
        body.append(f'<path class="level" d="M{_at(x.begin)} {_at(y(value))}H{_at(x.end)}"/>')
        body.append(_text(x.end - 4, y(value) - 5, text, anchor="end"))
    for line in lines:
        points = [
            (x(a), y(b))
            for a, b in zip(line.x, line.y, strict=True)
            if math.isfinite(b) and (b > 0 or not y_axis.log)
        ]
        if not points:
            continue
        path = [f"M{_at(points[0][0])} {_at(points[0][1])}"]
        for a, b in points[1:]:
            path.append(f"H{_at(a)}V{_at(b)}" if line.steps else f"L{_at(a)} {_at(b)}")
        dash = " dash" if line.dashed else ""
        body.append(
            f'<path class="line s{line.colour}{dash}" d="{"".join(path)}">'
            f"<title>{escape(line.name)}</title></path>"
        )
        if line.marks:
            for (a, b), u, v in zip(points, line.x, line.y, strict=True):
                shown = f"{v * 100:.1f} %" if percent else number(v)
                body.append(
                    f'<circle class="dot s{line.colour}" cx="{_at(a)}" cy="{_at(b)}" r="3">'
                    f"<title>{escape(f'{line.name}: {number(u)}, {shown}')}</title></circle>"
                )
    for u, v, colour, text in marks:
        body.append(
            f'<circle class="ring s{colour}" cx="{_at(x(u))}" cy="{_at(y(v))}" r="6">'
            f"<title>{escape(text)}</title></circle>"
        )
    return _svg(height, body, f"{y_axis.label} against {x_axis.label}")


def area_chart(
    x: Sequence[float], areas: Sequence[Area], x_axis: Axis, y_axis: Axis, *, height: float = 300.0
) -> str:
    """Areas stacked on each other, the first at the bottom."""
    totals = [sum(column) for column in zip(*(a.y for a in areas), strict=True)]
    # A single x still needs some width.
    across, upright, body = _plane(
        x_axis, y_axis, list(x) if len(x) > 1 else [x[0], x[0] + 1], totals, height, percent=False
    )
    base = [0.0] * len(x)
    shapes = []
    for area in areas:
        top = [b + v for b, v in zip(base, area.y, strict=True)]
        xs = [across(v) for v in x]
        if len(xs) == 1:
            xs, base, top = [across.begin, across.end], base * 2, top * 2
        there = "L".join(f"{_at(a)} {_at(upright(b))}" for a, b in zip(xs, top, strict=True))
        back = "L".join(
            f"{_at(a)} {_at(upright(b))}" for a, b in zip(reversed(xs), reversed(base), strict=True)
        )
        shapes.append(
            f'<path class="area s{area.colour}" d="M{there}L{back}Z">'
            f"<title>{escape(area.name)}</title></path>"
        )
        base = top[: len(x)]
    return _svg(height, shapes + body, f"{y_axis.label} over {x_axis.label}")


def bar_chart(bars: Sequence[Bar], axis: Axis, *, level: float | None = None) -> str:
    """Bars from left to right, one below the other, each with its name at the left and the length
    of its (upper) bar at its end."""
    tall = any(bar.below for bar in bars)
    pitch = 34.0 if tall else 26.0
    height = TOP + pitch * len(bars) + BOTTOM
    left = 14 + max(len(bar.name) for bar in bars) * CHARACTER
    longest = [
        max(sum(v for _, v, _ in bar.parts), sum(v for _, v, _ in bar.below)) for bar in bars
    ]
    low, high = _range(axis, [*longest, 0.0])
    room = 10 + max(len(number(v)) for v in longest) * CHARACTER
    x = _Scale(low, high, left, WIDTH - RIGHT - room)
    bottom = height - BOTTOM
    body = []
    for value in x.ticks(7):
        body.append(f'<path class="grid" d="M{_at(x(value))} {_at(bottom)}V{_at(TOP)}"/>')
        body.append(_text(x(value), bottom + 16, number(value), anchor="middle"))
    body.append(f'<path class="axis" d="M{_at(left)} {_at(TOP)}V{_at(bottom)}H{_at(x.end)}"/>')
    body.append(_text((left + x.end) / 2, bottom + 38, axis.label, anchor="middle", kind="label"))
    for i, bar in enumerate(bars):
        y = TOP + pitch * i + 4
        body.append(_text(left - 7, y + 13, bar.name, anchor="end", kind="name"))
        end = 0.0
        for parts, top, size in ((bar.below, y + 19, 7.0), (bar.parts, y, 18.0)):
            end = 0.0
            for name, value, colour in parts:
                begin, end = end, end + value
                if value <= 0:
                    continue
                body.append(
                    f'<rect class="fill s{colour}" x="{_at(x(begin))}" y="{_at(top)}" '
                    f'width="{max(x(end) - x(begin), 0.5):.1f}" height="{_at(size)}">'
                    f"<title>{escape(f'{bar.name}: {name} {number(value)}')}</title></rect>"
                )
        body.append(_text(x(end) + 6, y + 13, number(end)))
    if level is not None and low < level < high:
        body.append(f'<path class="level" d="M{_at(x(level))} {_at(TOP)}V{_at(bottom)}"/>')
    return _svg(height, body, axis.label)


def _places(x: float, y: float, width: float) -> list[tuple[float, float]]:
    """Left and lower ends of a text beside a point, the best first."""
    places = []
    for far in (0, 1, 2, 3, 4):
        gap, rise = 9 + 10 * far, LINE * far
        places += [
            (x + gap, y + 4 - rise),
            (x - gap - width, y + 4 - rise),
            (x - width / 2, y - 9 - rise),
            (x - width / 2, y + 18 + rise),
            (x + gap, y + 4 + rise),
            (x - gap - width, y + 4 + rise),
        ]
    return places


def point_chart(
    points: Sequence[Point],
    x_axis: Axis,
    y_axis: Axis,
    *,
    percent: bool = False,
    height: float = 330.0,
) -> str:
    """Points, each with its name beside it where there is room; the front's are joined."""
    x, y, body = _plane(
        x_axis,
        y_axis,
        [p.x for p in points],
        [p.y for p in points],
        height,
        percent=percent,
        pad=0.08,
    )
    front = sorted((p for p in points if p.front), key=lambda p: (p.x, p.y))
    if len(front) > 1:
        path = "L".join(f"{_at(x(p.x))} {_at(y(p.y))}" for p in front)
        body.append(f'<path class="front" d="M{path}"><title>Pareto front</title></path>')
    taken = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in points]
    texts = []
    # The front's points are named first: they are what a reader looks for.
    for point in sorted(points, key=lambda p: not p.front):
        a, b = x(point.x), y(point.y)
        shown = f"{point.y * 100:.1f} %" if percent else number(point.y)
        ring = " best" if point.front else ""
        body.append(
            f'<circle class="dot s{point.colour}{ring}" cx="{_at(a)}" cy="{_at(b)}" r="5">'
            f"<title>{escape(f'{point.name}: {number(point.x)}, {shown}')}</title></circle>"
        )
        text = point.name if point.text is None else point.text
        if not text:
            continue
        width = len(text) * CHARACTER
        for left, low in _places(a, b, width):
            box = (left, low - 11, left + width, low + 4)
            if (
                box[0] < x.begin + 2
                or box[2] > WIDTH - 2
                or box[1] < 2
                or box[3] > y.begin - 2
                or any(
                    box[0] < t[2] and t[0] < box[2] and box[1] < t[3] and t[1] < box[3]
                    for t in taken
                )
            ):
                continue
            taken.append(box)
            texts.append(_text(left, low, text, kind="name"))
            middle = left + width / 2, low - 4
            if math.hypot(max(left - a, 0, a - left - width), middle[1] - b) > 16:
                near = min(max(a, left), left + width)
                texts.insert(
                    0, f'<path class="leader" d="M{_at(a)} {_at(b)}L{_at(near)} {_at(low - 4)}"/>'
                )
            break
    return _svg(height, body + texts, f"{y_axis.label} against {x_axis.label}")


LEVELS = 9
"""Shades of a heat map: classes ``h0`` to ``h8``."""


def heat_map(
    values: Sequence[Sequence[float]],
    x_label: str,
    y_label: str,
    *,
    high: float,
    unit: str,
) -> str:
    """Cells shaded by value, from 0 to ``high`` and more; row 0 at the top.

    Cells of one shade are one path, so that 65,536 cells stay small. The values themselves, to two
    digits, are in ``data-values`` for the page's script to show under the pointer.
    """
    rows, columns = len(values), len(values[0])
    left, right = 30 + len(str(rows - 1)) * CHARACTER, WIDTH - RIGHT - 90
    cell_height = min(24.0, max(3.0, 360.0 / rows))
    bottom = TOP + cell_height * rows
    cell_width = (right - left) / columns
    paths: list[list[str]] = [[] for _ in range(LEVELS)]
    for i, row in enumerate(values):
        j = 0
        while j < columns:
            shade = min(LEVELS - 1, int(LEVELS * row[j] / high)) if high > 0 else 0
            run = j + 1
            while run < columns and shade == (
                min(LEVELS - 1, int(LEVELS * row[run] / high)) if high > 0 else 0
            ):
                run += 1
            x, y = left + cell_width * j, TOP + cell_height * i
            paths[shade].append(
                f"M{x:.2f} {y:.2f}h{cell_width * (run - j):.2f}v{cell_height:.2f}"
                f"h{-cell_width * (run - j):.2f}z"
            )
            j = run
    body = [
        f'<path class="heat h{shade}" d="{"".join(parts)}"/>'
        for shade, parts in enumerate(paths)
        if parts
    ]
    for count, at, along in ((rows, TOP, False), (columns, left, True)):
        size = cell_width if along else cell_height
        room = len(str(count - 1)) * CHARACTER + 12 if along else LINE
        step = next(
            m for m in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 128, 256) if m * size >= room
        )
        for n in range(0, count, step):
            middle = at + size * (n + 0.5)
            if along:
                body.append(_text(middle, bottom + 16, str(n), anchor="middle"))
            else:
                body.append(_text(left - 7, middle + 4, str(n), anchor="end"))
    middle = (TOP + bottom) / 2
    body.append(_text((left + right) / 2, bottom + 38, x_label, anchor="middle", kind="label"))
    body.append(
        f'<text class="label" transform="translate(13 {_at(middle)}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    # The key of the shades, lowest at the bottom.
    key = right + 16
    key_height = min(18.0, max(12.0, (bottom - TOP) / LEVELS))
    for shade in range(LEVELS):
        y = TOP + key_height * (LEVELS - 1 - shade)
        body.append(
            f'<rect class="heat h{shade}" x="{_at(key)}" y="{_at(y)}" width="16" '
            f'height="{_at(key_height)}"/>'
        )
        if shade % 2 == 0:
            more = "+" if shade == LEVELS - 1 else ""
            text = f"{number(high * shade / LEVELS, 2)}{more} {unit}"
            body.append(_text(key + 22, y + key_height / 2 + 4, text))
    height = max(bottom, TOP + key_height * LEVELS) + BOTTOM
    data = ";".join(",".join(number(v, 2).replace(",", "") for v in row) for row in values)
    svg = _svg(height, body, f"{unit} by {y_label} and {x_label}")
    frame = f"{left:.2f} {TOP:.2f} {cell_width:.4f} {cell_height:.4f}"
    return svg.replace(
        "<svg ",
        f'<svg data-heat="{frame}" data-values="{data}" data-names="{escape(y_label)},'
        f'{escape(x_label)},{escape(unit)}" ',
        1,
    )
