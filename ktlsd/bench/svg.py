"""Charts as inline SVG. Colours come from the page (classes and variables), so light, dark and paper need one drawing.

All text goes through Markup.format, which escapes it.
"""

import math
from collections.abc import Callable
from typing import Final

from markupsafe import Markup

from ktlsd.bench import charts, words
from ktlsd.bench.charts import BarChart, Line, LineChart

_WIDTH: Final = 760  # the page's width in CSS pixels; it scales
_LABEL: Final = 7.8  # pixels of a character at 13 px in a wide font, on average
_BAR: Final = 24  # pixels from bar to bar
_VALUE: Final = 190  # pixels to the right of bars, for "1,234 (1,100 to 1,400)"
_TOP: Final = 8
_FOOT: Final = 24
_HEIGHT: Final = 400  # of a line chart
_GAP: Final = 15  # pixels from label to label
_DASHES: Final = ("", "7 3", "2 3", "9 3 2 3", "4 2")
_NOTHING: Final = Markup("")


def bars(chart: BarChart) -> Markup:
    """Return horizontal bars with whiskers, each with its label before it and its figures behind it; nothing for no bars."""
    if not chart.bars:
        return _NOTHING
    left = min(_WIDTH * 0.48, max(len(bar.label) for bar in chart.bars) * _LABEL + 8)
    highest = max(bar.figure.high for bar in chart.bars) or 1.0
    scale = (_WIDTH - left - _VALUE) / highest
    bottom = _TOP + _BAR * len(chart.bars)
    parts = [_axis(left + tick * scale, bottom, f"{tick:,g}") for tick in charts.ticks(highest)]
    for number, bar in enumerate(chart.bars):
        top, middle = _TOP + _BAR * number + 4, _TOP + _BAR * number + _BAR / 2
        low, high = left + bar.figure.low * scale, left + bar.figure.high * scale
        parts.append(_text(left - 8, middle + 4.5, bar.label, "end"))
        shade = "tls-{0}" if bar.part is None else "tls-{0} rest"
        parts.append(_rectangle(left, top, bar.figure.middle * scale, shade.format(bar.tls)))
        if bar.part:
            parts.append(_rectangle(left, top, min(bar.part, bar.figure.middle) * scale, f"tls-{bar.tls}"))
        parts.append(
            Markup('<path class="whisker" d="M{0:.1f} {2:.1f}v8m0 -4H{1:.1f}m0 -4v8"/>').format(low, high, middle - 4)
        )  # fmt: skip
        f = bar.figure
        shown = f"{words.figure(f.middle)} ({words.figure(f.low)} to {words.figure(f.high)})"
        parts.append(_text(high + 8, middle + 4.5, shown, "start"))
    return _drawing(f"{chart.title}: {chart.about}", bottom + _FOOT, parts)


def lines(chart: LineChart) -> Markup:
    """Return a line for each subject over the size, both logarithmic, each with its label at its end and whiskers."""
    left, right = 56.0, _WIDTH - min(_WIDTH * 0.55, max(len(line.label) for line in chart.lines) * _LABEL + 34)
    bottom = _HEIGHT - 58
    steps = chart.ticks
    first, last = math.log(chart.sizes[0]), math.log(chart.sizes[-1])

    def x(size: int) -> float:
        return left + (math.log(size) - first) / (last - first) * (right - left)

    def y(value: float) -> float:
        return bottom - math.log(value / steps[0]) / math.log(steps[-1] / steps[0]) * (bottom - _TOP)

    parts = []
    for step in steps:
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}H{:.1f}"/>').format(left, y(step), right))
        parts.append(_text(left - 8, y(step) + 4.5, f"{step:,g}", "end"))
    occupied = [0.0, 0.0]  # where the last label ends, in two rows
    for size in chart.sizes:
        label = words.size(size)
        half = len(label) * _LABEL / 2
        parts.append(Markup('<path class="grid" d="M{:.1f} {:.1f}v5"/>').format(x(size), bottom))
        row = next((row for row in (0, 1) if x(size) - half >= occupied[row]), None)
        if row is not None:
            parts.append(_text(x(size), bottom + 18 + 14 * row, label, "middle"))
            occupied[row] = x(size) + half + 4
    parts.append(_text((left + right) / 2, bottom + 52, "size of one transfer", "middle"))
    parts.append(_text(left + 4, _TOP + 12, "MB/s", "start"))
    wanted = [y(line.points[-1][1].middle) for line in chart.lines]
    for line, at in zip(chart.lines, charts.apart(wanted, _GAP, _TOP + 4, _HEIGHT - 10), strict=True):
        parts += _line(line, x, y)
        end, height = x(line.points[-1][0]), y(line.points[-1][1].middle)
        parts.append(Markup('<path class="leader" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(end + 6, height, right + 22, at))
        parts.append(_text(right + 26, at + 4.5, line.label, "start", f"ink-{line.colour}"))
    return _drawing(chart.title, _HEIGHT, parts)


def _line(line: Line, x: Callable[[int], float], y: Callable[[float], float]) -> list[Markup]:
    points = [(x(size), y(figure.middle)) for size, figure in line.points]
    way = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    parts = [
        Markup('<path class="line line-{}" stroke-dasharray="{}" d="{}"/>').format(
            line.colour, _DASHES[line.number % len(_DASHES)] or "none", way
        )
    ]
    for (a, b), (_, figure) in zip(points, line.points, strict=True):
        parts.append(
            Markup('<path class="line thin line-{}" d="M{:.1f} {:.1f}V{:.1f}"/>').format(
                line.colour, a, y(figure.low), y(figure.high)
            )
        )
        parts.append(Markup('<path class="tls-{}" d="{}"/>').format(line.colour, _marker(line.number, a, b)))
    return parts


def _marker(number: int, x: float, y: float) -> str:
    """Return a filled shape around a point: circle, square, triangle, diamond, and a triangle that stands on its head."""
    shapes = (
        "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        "m-3.5 -3.5h7v7h-7z",
        "m0 -5l4.6 8h-9.2z",
        "m0 -5l5 5l-5 5l-5 -5z",
        "m0 5l4.6 -8h-9.2z",
    )
    return f"M{x:.1f} {y:.1f}{shapes[number % len(shapes)]}"


def _axis(x: float, bottom: float, label: str) -> Markup:
    line = Markup('<path class="grid" d="M{:.1f} {}V{:.1f}"/>').format(x, _TOP, bottom)
    return line + _text(x, bottom + 17, label, "middle")


def _rectangle(left: float, top: float, width: float, shade: str) -> Markup:
    return Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}"/>').format(
        shade, left, top, max(width, 0.5), _BAR - 8
    )


def _text(x: float, y: float, text: str, anchor: str, shade: str = "ink") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(shade, x, y, anchor, text)


def _drawing(title: str, height: float, parts: list[Markup]) -> Markup:
    opening = Markup('<svg viewBox="0 0 {} {:.0f}" role="img" aria-label="{}">').format(_WIDTH, height, title)
    return opening + _NOTHING.join(parts) + Markup("</svg>")
