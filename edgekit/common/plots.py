"""Small SVG plots for a page: scatter, bars and lines, with axes, units and no script.

Colours and fonts come from the page: series i has the class `s<i>` and its own marker, so that
plots are legible in light and dark and without colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 66, 26, 16, 50
MARKERS = ("circle", "square", "triangle", "diamond", "cross", "ring")


@dataclass(frozen=True)
class Point:
    """A value of one series; `error` is drawn as a bar up and down."""

    series: int
    label: str
    x: float
    y: float
    error: float = 0.0


@dataclass(frozen=True)
class Axis:
    """One axis: what it says, its range and its ticks, linear or logarithmic."""

    title: str
    low: float
    high: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    @classmethod
    def over(cls, title: str, values: Sequence[float], zero: bool = True) -> "Axis":
        """Cover the values in round steps; `zero` lets the axis begin there."""
        low, high = (0.0 if zero else min(values)), max(values)
        if high <= low:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        step = _round_step((high - low) / 5)
        first, last = math.floor(low / step), math.ceil(high / step * (1 - 1e-9))
        ticks = tuple(index * step for index in range(first, last + 1))
        return cls(title, ticks[0], ticks[-1], ticks)

    @classmethod
    def log_over(cls, title: str, values: Sequence[float]) -> "Axis":
        """Cover positive values from tick to tick of 1, 2 and 5; of many only powers of ten."""
        low, high = min(values), max(values)
        decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        first = max(tick for tick in ticks if tick < low / 1.2)
        last = min(tick for tick in ticks if tick > high * 1.2)
        inner = [tick for tick in ticks if first <= tick <= last]
        if len(inner) > 6:
            inner = [tick for tick in inner if f"{tick:e}".startswith("1")]
        return cls(title, first, last, tuple(inner), True)

    def place(self, value: float) -> float:
        """Return where a value lies, 0 to 1."""
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Return a plot of labelled points."""
    parts = _frame(x, y)
    boxes = [_point_box(point, x, y) for point in points]
    labels = []
    for point in points:
        at, up = _x(x, point.x), _y(y, point.y)
        parts += [_error_bar(point, at, y), marker(point.series, at, up, _tip(point, x, y))]
        label, box = _free_label(point.label, at, up, boxes)
        boxes.append(box)
        labels.append(label)
    return _svg(title, parts + labels)


def lines(
    title: str,
    series: Sequence[tuple[int, Sequence[tuple[int, float]]]],
    names: Sequence[str],
    x_title: str,
    y: Axis,
) -> str:
    """Return a plot of series `(index, [(place among names, value)])` over named places."""
    step = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    places = [LEFT + step * (index + 0.5) for index in range(len(names))]
    parts = _frame(None, y)
    every = math.ceil(len(names) / 18)
    for index, name in enumerate(names):
        if index % every == 0 or not name.isdigit():
            parts.append(_text(places[index], HEIGHT - BOTTOM + 17, name, "tick", "middle"))
    parts.append(_axis_title(x_title))
    for number, values in series:
        path = " ".join(f"{places[at]:.1f},{_y(y, value):.1f}" for at, value in values)
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        for at, value in values:
            tip = f"{names[at]}: {value:.1f} {y.title}"
            parts.append(marker(number, places[at], _y(y, value), tip, 3.6))
    return _svg(title, parts)


def bars(title: str, points: Sequence[Point], x: Axis) -> str:
    """Return horizontal bars, one per point, of their `x`, with `error` to both sides."""
    row = 42
    height = TOP + row * len(points) + BOTTOM
    parts = [_grid_line(_x(x, tick), TOP, _x(x, tick), height - BOTTOM) for tick in x.ticks]
    parts += [
        _text(_x(x, tick), height - BOTTOM + 17, _number(tick), "tick", "middle")
        for tick in x.ticks
    ]
    for index, point in enumerate(points):
        top, end = TOP + row * index, _x(x, point.x)
        label = point.label
        parts.append(_text(LEFT, top + 12, label, "label", "start"))
        parts.append(
            f'<rect class="bar s{point.series}" x="{LEFT}" y="{top + 17}" '
            f'width="{max(0.0, end - LEFT):.1f}" height="16" rx="2">'
            f"<title>{escape(f'{label}: {_number(point.x)} {x.title}')}</title></rect>"
        )
        if point.error:
            low, high = _x(x, max(x.low, point.x - point.error)), _x(x, point.x + point.error)
            parts.append(_whisker(low, top + 25, high, top + 25))
        parts.append(_bar_value(point, end, top + 29, x))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 8, x.title, "axis", "middle"))
    return _svg(title, parts, height)


def _bar_value(point: Point, end: float, y: float, x: Axis) -> str:
    """Write the value inside a long bar, else behind it, clear of the error."""
    low, high = _x(x, max(x.low, point.x - point.error)), _x(x, point.x + point.error)
    if min(end, low) - LEFT > 90:
        return _text(min(end, low) - 8, y, _number(point.x), "value in", "end")
    return _text(max(end, high) + 8, y, _number(point.x), "value", "start")


def marker(series: int, x: float, y: float, tip: str = "", size: float = 6.0) -> str:
    """Return the marker of a series, with a text that a browser shows on hovering."""
    shape = MARKERS[series % len(MARKERS)]
    wide = size * 1.15
    drawn = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}"',
        "ring": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size}" fill-opacity="0.25"',
        "square": f'<rect x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" '
        f'height="{2 * size}"',
        "triangle": _polygon([(x, y - wide), (x + wide, y + size), (x - wide, y + size)]),
        "diamond": _polygon([(x, y - wide), (x + wide, y), (x, y + wide), (x - wide, y)]),
        "cross": _cross(x, y, size),
    }[shape]
    tag = drawn[1:].partition(" ")[0]
    return f'{drawn} class="mark s{series}"><title>{escape(tip)}</title></{tag}>'


def _polygon(corners: Sequence[tuple[float, float]]) -> str:
    return '<polygon points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in corners) + '"'


def _cross(x: float, y: float, size: float) -> str:
    a, b = size, size / 3
    turns = [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b)]
    return _polygon([(x + dx, y + dy) for dx, dy in [*turns, (-a, -b), (-b, -b)]])


def _frame(x: Axis | None, y: Axis) -> list[str]:
    """Draw the grid, the ticks and the titles of both axes."""
    bottom = HEIGHT - BOTTOM
    parts = [_grid_line(LEFT, _y(y, tick), WIDTH - RIGHT, _y(y, tick)) for tick in y.ticks]
    parts += [_text(LEFT - 8, _y(y, tick) + 4, _number(tick), "tick", "end") for tick in y.ticks]
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text class="axis" text-anchor="middle" transform="translate(14 {middle}) rotate(-90)">'
        f"{escape(y.title)}</text>"
    )
    parts.append(
        f'<line class="edge" x1="{LEFT}" y1="{bottom}" x2="{WIDTH - RIGHT}" y2="{bottom}"/>'
    )
    if x is not None:
        parts += [
            _text(_x(x, tick), bottom + 17, _number(tick), "tick", "middle") for tick in x.ticks
        ]
        parts.append(_axis_title(x.title))
    return parts


def _axis_title(title: str) -> str:
    return _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, title, "axis", "middle")


def _error_bar(point: Point, at: float, y: Axis) -> str:
    if not point.error:
        return ""
    low = max(point.y - point.error, y.low)
    return _whisker(at, _y(y, min(point.y + point.error, y.high)), at, _y(y, low))


def _whisker(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="whisker" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


Box = tuple[float, float, float, float]


def _point_box(point: Point, x: Axis, y: Axis) -> Box:
    """Return what a point covers with its error bar."""
    at, up = _x(x, point.x), _y(y, point.y)
    reach = abs(_y(y, max(point.y - point.error, y.low)) - up) if point.error else 0.0
    return at - 8, up - max(8, reach), at + 8, up + max(8, reach)


def _free_label(text: str, x: float, y: float, taken: Sequence[Box]) -> tuple[str, Box]:
    """Put a label beside its point where it covers nothing, else where it covers least."""
    width = 6.6 * len(text)
    options = []
    for dx, dy, anchor in (
        (11, 4, "start"),
        (-11, 4, "end"),
        (0, -13, "middle"),
        (0, 21, "middle"),
        (11, -12, "start"),
        (-11, -12, "end"),
        (11, 20, "start"),
        (-11, 20, "end"),
        (11, 35, "start"),
        (-11, 35, "end"),
        (11, -27, "start"),
        (-11, -27, "end"),
    ):
        left = x + dx - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        box = (left, y + dy - 11, left + width, y + dy + 3)
        covered = sum(_overlap(box, other) for other in taken)
        options.append((covered + 5 * _outside(box), dx, dy, anchor, box))
    _, dx, dy, anchor, box = min(options, key=lambda option: option[0])
    return _text(x + dx, y + dy, text, "label", anchor), box


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box) -> float:
    beyond = max(0.0, LEFT + 2 - box[0]) + max(0.0, box[2] - WIDTH + 4)
    return 14 * (beyond + max(0.0, 2 - box[1]) + max(0.0, box[3] - HEIGHT + BOTTOM - 2))


def _tip(point: Point, x: Axis, y: Axis) -> str:
    return f"{point.label}: {_number(point.y)} {y.title}, {_number(point.x)} {x.title}"


def _grid_line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="grid" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + axis.place(value) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - axis.place(value) * (HEIGHT - TOP - BOTTOM)


def _svg(title: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    body = "\n".join(part for part in parts if part)
    head = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
    return f"{head}\n{body}\n</svg>"


def _round_step(rough: float) -> float:
    """Return the least of 1, 2, 2.5, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(digit * power for digit in (1, 2, 2.5, 5, 10) if digit * power >= rough * 0.999)


def _number(value: float) -> str:
    """Write a few significant digits, below a thousandth with an exponent."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1e-3:
        return f"{value:.4g}"
    digits, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}"
