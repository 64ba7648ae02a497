"""A result as one picture: for each condition bars of its largest size, and throughput against size. Needs matplotlib."""

import io
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final

from ktlsd.bench import charts, report, verdicts, words
from ktlsd.bench.charts import BarChart, LineChart
from ktlsd.bench.result import Result
from ktlsd.errors import StartError

if TYPE_CHECKING:
    from ktlsd.bench.report import Group

_WIDTH: Final = 15.0  # inches
_DPI: Final = 110
_BAR: Final = 0.3  # inches from bar to bar
_LINES: Final = 5.0  # inches of a plot against size
_HEAD: Final = 1.5  # inches for what is above and below
_LINE: Final = 0.22  # inches of a line of the title
_MOST: Final = 8  # conditions; the HTML page has all
_INK: Final = "#1f2328"
_SOFT: Final = "#59636e"
_GRID: Final = "#d8dee4"
_DASHES: Final = ("-", (0, (5, 2)), (0, (1.5, 2)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))
_MARKERS: Final = "os^Dv"


def render(result: Result) -> bytes:
    """Return a PNG. Raises StartError if matplotlib is not installed."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as exc:
        raise StartError(f"bench --png needs matplotlib ({exc}): pip install 'ktlsd[bench]'") from exc
    conditions = report.conditions(report.groups(result))
    heights = [height for together in conditions[:_MOST] for height in _heights(together)]
    with rc_context({"text.parse_math": False}):  # a dollar sign is no formula
        size = (_WIDTH, _HEAD + _LINE * _title(result).count("\n") + sum(heights))
        figure = Figure(size, _DPI, facecolor="white", layout=ConstrainedLayoutEngine(h_pad=0.12))
        FigureCanvasAgg(figure)
        _fill(figure, result, conditions, heights)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def _heights(together: list["Group"]) -> list[float]:
    """Return the inches of a condition's rows of plots: bars, and lines where there are several sizes."""
    return [1.1 + _BAR * len(together[-1].rows)] + [_LINES] * (charts.against_size(together) is not None)


def _fill(figure: Any, result: Result, conditions: list[list["Group"]], heights: list[float]) -> None:
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=13, color=_INK)
    left_out = max(0, len(conditions) - _MOST)
    figure.supxlabel(fill(_foot(result, left_out), 200), x=0.01, ha="left", fontsize=9, color=_SOFT)
    if not conditions:
        figure.text(0.5, 0.5, "Nothing was measured.", ha="center", fontsize=14, color=_INK)
        return
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    row = 0
    for together in conditions[:_MOST]:
        _pair(figure, (grid[row, 0], grid[row, 1]), together[-1])
        row += 1
        if chart := charts.against_size(together):
            _lines(figure.add_subplot(grid[row, :]), chart)
            row += 1


def _title(result: Result) -> str:
    """Return the answers, the first one's question about kernel TLS before all."""
    answers = [words.printable(f"{answered.question} {answered.answer}") for answered in verdicts.findings(result)]
    return "\n".join(fill(answer, 130) for answer in answers)


def _foot(result: Result, left_out: int) -> str:
    machine = result.machine
    parts = [f"{result.began}, {machine.system}{f' ({machine.virtual})' if machine.virtual else ''}, {machine.cpu}."]
    parts += [*verdicts.virtual(machine.virtual), report.intervals(report.groups(result))]
    for wrong, title in report.FAILED.items():
        names = [f"{f.subject.name} ({words.TLS[f.subject.tls]})" for f in result.failures if f.wrong == wrong]
        if names:
            parts.append(f"{title}: {', '.join(dict.fromkeys(names))}.")
    if left_out:
        parts.append(f"{left_out} more conditions are on the HTML page.")
    return words.printable(" ".join(part for part in parts if part))


def _pair(figure: Any, places: tuple[Any, Any], group: "Group") -> None:
    """Draw throughput and CPU time side by side; they have their labels in common, unless one lacks a subject."""
    left, right = charts.throughput(group), charts.cpu(group)
    _bars(figure.add_subplot(places[0]), left, labels=True)
    _bars(figure.add_subplot(places[1]), right, labels=[b.label for b in left.bars] != [b.label for b in right.bars])


def _bars(axes: Any, chart: BarChart, *, labels: bool) -> None:
    _plain(axes, f"{chart.title} ({chart.better})", chart.parts or chart.about)
    highest = max((bar.figure.high for bar in chart.bars), default=0) or 1.0
    for number, bar in enumerate(chart.bars):
        colour, found = charts.COLOURS[bar.tls], bar.figure
        axes.barh(number, found.middle, height=0.66, color=colour, alpha=1 if bar.part is None else 0.5, linewidth=0)
        if bar.part:
            axes.barh(number, min(bar.part, found.middle), height=0.66, color=colour, linewidth=0)
        around = [[found.middle - found.low], [found.high - found.middle]]
        axes.errorbar(found.middle, number, xerr=around, color=_INK, capsize=3, linewidth=1.2)
        shown = f"{words.figure(found.middle)} ({words.figure(found.low)} to {words.figure(found.high)})"
        axes.annotate(shown, (found.high, number), (6, 0), textcoords="offset points", va="center", fontsize=9, color=_INK)
    names = [bar.label if labels else "" for bar in chart.bars]
    axes.set_yticks(range(len(chart.bars)), names, fontsize=10, color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, highest * 1.45)  # room for the figures
    axes.set_xticks(charts.ticks(highest), [f"{tick:,g}" for tick in charts.ticks(highest)])
    axes.grid(axis="x", color=_GRID)


def _lines(axes: Any, chart: LineChart) -> None:
    _plain(axes, chart.title, "higher is better; both axes are logarithmic, upright strokes are intervals")
    axes.set_xscale("log")
    axes.set_yscale("log")
    for line in chart.lines:
        x, found = [size for size, _ in line.points], [figure for _, figure in line.points]
        y = [f.middle for f in found]
        around = [[f.middle - f.low for f in found], [f.high - f.middle for f in found]]
        style = {"color": charts.COLOURS[line.colour], "linestyle": _DASHES[line.number % len(_DASHES)]}
        axes.errorbar(x, y, yerr=around, marker=_MARKERS[line.number % len(_MARKERS)], elinewidth=1, linewidth=1.8, **style)
    steps = chart.ticks
    axes.set_ylim(steps[0], steps[-1])
    axes.set_xlim(chart.sizes[0] / 1.15, chart.sizes[-1] * 1.15)
    axes.set_yticks(steps, [f"{step:,g}" for step in steps])
    axes.set_xticks(chart.sizes, [words.size(size) for size in chart.sizes], rotation=30 if len(chart.sizes) > 12 else 0)
    axes.minorticks_off()
    axes.set_ylabel("MB/s", color=_SOFT)
    axes.set_xlabel("size of one transfer", color=_SOFT)
    axes.grid(axis="y", color=_GRID)
    _label(axes, chart)


def _label(axes: Any, chart: LineChart) -> None:
    """Write each line's name at its end, moved apart where they would overlap. In parts of the axes' height."""
    ends = [
        axes.transLimits.transform(axes.transScale.transform((line.points[-1][0], line.points[-1][1].middle)))
        for line in chart.lines
    ]
    places = charts.apart([end[1] for end in ends], 0.052, 0.0, 1.0)
    for line, end, place in zip(chart.lines, ends, places, strict=True):
        axes.annotate(
            line.label, end, (1.02, place), xycoords="axes fraction", textcoords="axes fraction",
            va="center", fontsize=10, color=charts.COLOURS[line.colour], annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": _SOFT, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 5, "relpos": (0, 0.5)},
        )  # fmt: skip


def _plain(axes: Any, title: str, below: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK, pad=20)
    axes.annotate(
        below, (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=9, color=_SOFT, in_layout=False
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_GRID)
    axes.tick_params(length=0, labelcolor=_INK)
    axes.set_axisbelow(True)
