"""What is drawn, before anybody draws it: the HTML page's SVG and matplotlib's PNG show the same bars and lines.

Colour says who encrypts, and so does every label: blue and vermilion are told apart with any colour blindness (M. Okabe and
K. Ito, Color Universal Design), and by their lightness on paper. What has the same colour differs in marker and dashes.
Lines of several servers have a colour for each server: ten of one colour can't be told apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ktlsd.bench import words
from ktlsd.bench.report import Group, Row
from ktlsd.bench.result import Tls
from ktlsd.bench.stats import Interval

COLOURS: Final = {
    "none": "#6e7781", "userspace": "#d55e00", "kernel": "#0072b2",
    "server-0": "#0072b2", "server-1": "#d55e00", "server-2": "#00805d", "server-3": "#a8457f", "server-4": "#8a6100",
    "server-5": "#2a8fc9", "server-6": "#6e7781", "server-7": "#7a5ad0", "server-8": "#1f2328",
}  # fmt: skip
COLOURS_DARK: Final = {
    "none": "#9aa4ae", "userspace": "#f0883e", "kernel": "#56b4e9",
    "server-0": "#56b4e9", "server-1": "#f0883e", "server-2": "#2fc79a", "server-3": "#e08fc0", "server-4": "#e0b23c",
    "server-5": "#a5d8ff", "server-6": "#9aa4ae", "server-7": "#b9a3ff", "server-8": "#e6edf3",
}  # fmt: skip
_SERVERS: Final = sum(name.startswith("server-") for name in COLOURS)
_TICKS: Final = 5  # so many at most, 0 aside


@dataclass(frozen=True, slots=True)
class Bar:
    """One subject's figure, in the chart's unit; `part` of it is drawn darker (user of CPU time), None for no parts."""

    label: str
    tls: Tls
    figure: Interval
    part: float | None = None


@dataclass(frozen=True, slots=True)
class BarChart:
    """Bars of one load."""

    title: str
    about: str  # the load
    better: str  # "longer is better"
    bars: tuple[Bar, ...]
    parts: str = ""  # what the parts of a bar are


@dataclass(frozen=True, slots=True)
class Line:
    """One subject against size: (bytes of a transfer, MB/s), and the how manieth it is of its colour (one of COLOURS)."""

    label: str
    colour: str
    number: int
    points: tuple[tuple[int, Interval], ...]


@dataclass(frozen=True, slots=True)
class LineChart:
    """Throughput against size under one condition; both axes are logarithmic."""

    title: str
    sizes: tuple[int, ...]
    lines: tuple[Line, ...]

    @property
    def ticks(self) -> list[float]:
        """The round values (1, 2 and 5 of each power of ten) between which everything lies, both ends among them."""
        values = [value for line in self.lines for _, figure in line.points for value in (figure.low, figure.high)]
        low, high = min(values), max(values)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        first = max((step for step in steps if step <= low), default=steps[0])
        last = min((step for step in steps if step >= high and step > first), default=steps[-1])
        return [step for step in steps if first <= step <= last]


def throughput(group: Group) -> BarChart:
    """Return throughput by way, MB/s."""
    bars = [Bar(_label(r), r.subject.tls, scaled(r.speed, 1e-6)) for r in group.rows if r.speed]
    return BarChart("Throughput, MB/s", group.title, "longer is better", tuple(bars))


def cpu(group: Group) -> BarChart:
    """Return CPU time by way, seconds per GB."""
    bars = [Bar(_label(r), r.subject.tls, r.cpu, r.user) for r in group.rows if r.cpu]
    parts = "the darker part is user, the rest system"
    return BarChart("CPU seconds per GB", group.title, "shorter is better", tuple(bars), parts)


def against_size(together: Sequence[Group]) -> LineChart | None:
    """Return throughput against size for groups that differ in size alone; None for a single size."""
    sizes = tuple(group.load.size for group in together)
    if len(sizes) < 2:
        return None
    lines: list[Line] = []
    rows = [(group.load.size, row) for group in together for row in group.rows]
    servers = list(dict.fromkeys(row.subject.name for _, row in rows if row.subject.protocol != "raw"))
    for subject in dict.fromkeys(row.subject for _, row in rows):
        points = [(size, scaled(row.speed, 1e-6)) for size, row in rows if row.subject == subject and row.speed]
        points = [(size, speed) for size, speed in points if speed.low > 0]  # has no place on a logarithmic axis
        label = max((_label(row) for _, row in rows if row.subject == subject), key=len)  # the one that says "not", if any does
        if points:
            several = len(servers) > 1 and subject.name in servers
            colour = f"server-{servers.index(subject.name) % _SERVERS}" if several else subject.tls
            number = sum(line.colour == colour for line in lines)
            lines.append(Line(label, colour, number, tuple(points)))
    return LineChart(f"Throughput against size: {words.condition(together[0].load)}", sizes, tuple(lines)) if lines else None


def _label(row: Row) -> str:
    """Return the name and who encrypts; and if that was not so, that it was not."""
    return f"{row.label}, {'not ' if row.trouble else ''}{words.TLS[row.subject.tls]}"


def scaled(figure: Interval, factor: float) -> Interval:
    """Return the same in another unit."""
    return Interval(figure.middle * factor, figure.low * factor, figure.high * factor, figure.count)


def ticks(highest: float) -> list[float]:
    """Return round values from 0 to `highest`, evenly apart."""
    if highest <= 0:
        return [0.0]
    power = 10 ** math.floor(math.log10(highest / _TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if highest / (factor * power) <= _TICKS)
    return [number * step for number in range(math.floor(highest / step) + 1)]


def apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return where labels go that want to be there, at least `gap` from each other, within low..high as far as there is room.

    Labels that would overlap form a block whose middle is the mean of what they want; blocks that meet become one.
    """
    order = sorted(range(len(wanted)), key=lambda at: wanted[at])
    blocks: list[list[int]] = []

    def start(block: list[int]) -> float:
        extent = gap * (len(block) - 1)
        middle = sum(wanted[at] for at in block) / len(block)
        return max(low, min(middle - extent / 2, high - extent))

    for at in order:
        blocks.append([at])
        while len(blocks) > 1 and start(blocks[-2]) + gap * len(blocks[-2]) > start(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    placed = [0.0] * len(wanted)
    for block in blocks:
        for number, at in enumerate(block):
            placed[at] = start(block) + gap * number
    return placed
