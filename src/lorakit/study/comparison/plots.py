"""A metric against the trained parameters, as in figure 2 of the LoRA paper.

    x   log₁₀ of the parameters; a method that trains only the head stands at 0, to the left of the axis' break
    y   the mean over the seeds with its interval, on an axis that fits the data

A family of methods ("lora") has one colour and one marker, which is hollow if other settings than the size are changed.
Members that differ only in size are joined by a line, and only the smallest of them is labelled in full.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ...core.numbers import short_count, short_number
from ...training.colours import LIGHT
from ...training.svg import new_figure, styled, svg
from .labels import LINE, Box, Spot, placed
from .results import Comparison, TaskFacts
from .table import higher_is_better, rows_of

# For each family: a colour, a matplotlib marker, and its size. All markers have about the same area.
_LOOKS = (
    ("blue", "o", 8.0),
    ("orange", "s", 7.2),
    ("green", "D", 6.8),
    ("violet", "^", 9.0),
    ("red", "v", 9.0),
    ("cyan", "P", 9.0),
    ("pink", "h", 9.0),
    ("slate", "<", 9.0),
    ("ink", ">", 9.0),
)
_HEIGHT = 440
WIDE, NARROW = 760, 400  # pixels: of a page on a screen, and on a phone, where text would be too small in the wide one
_ZERO = 0.35  # distance from "0" to the start of the logarithmic axis, as a share of a decade's width
_LONGEST = 40  # characters of a label


@dataclass(frozen=True)
class Point:
    """A method in the plot."""

    label: str
    family: str  # one colour and one marker
    others: str  # settings besides the size; points of a family with the same ones form a line
    parameters: int
    value: float
    ends: tuple[float, float] | None  # of its interval
    title: str  # shown when the pointer is on it


def points_of(comparison: Comparison, task: TaskFacts) -> list[Point]:
    """A point for each method that has the task's first metric."""
    metric = task.metrics[0]
    rows = [row for row in rows_of(comparison, task) if metric in row.scores]
    points: list[Point] = []
    labelled: set[tuple[str, str]] = set()
    for row in sorted(rows, key=lambda row: row.parameters):
        interval = row.scores[metric]
        if not math.isfinite(interval.mean):
            continue
        name, size, others = _parts(row.method)
        ends = interval.ends
        within = f" ({short_number(ends[0], 4)} to {short_number(ends[1], 4)})" if ends else ""
        points.append(
            Point(
                label=_shortened(size if (name, others) in labelled else row.method),
                family=name,
                others=others,
                parameters=row.parameters,
                value=interval.mean,
                ends=interval.ends,
                title=f"{row.method}: {short_number(interval.mean, 4)}{within}, {row.parameters:,} parameters",
            )
        )
        labelled.add((name, others))
    return points


def families(comparison: Comparison) -> list[str]:
    """The families in the order of their colours, which is the same for all tasks: LoRA first, then as they come."""
    found = dict.fromkeys(_parts(row.method)[0] for row in comparison.rows)
    return sorted(found, key=lambda family: family != "lora")


@styled()
def scatter(points: Sequence[Point], metric: str, families: Sequence[str], width: int = WIDE) -> Markup:
    """The plot of one or more points. families: all families, in the order of their colours. width: in pixels."""
    figure = new_figure(width, _HEIGHT)
    left = 62 if width == WIDE else 44
    area = Box(left, 48, width - left - 16, 358)  # where points are drawn
    axes = figure.add_axes(
        (area.x / width, area.y / _HEIGHT, area.width / width, area.height / _HEIGHT),
        xlabel="trainable parameters",
    )
    _across([point.parameters for point in points], axes)
    _upwards(points, axes)
    name = metric if higher_is_better(metric) else f"{metric} (lower is better)"
    figure.text(8, _HEIGHT - 18, name, transform=None, color=LIGHT["soft"], parse_math=False)
    looks = {family: _LOOKS[index % len(_LOOKS)] for index, family in enumerate(families)}
    places: list[Spot] = [tuple(axes.transData.transform((point.parameters, point.value))) for point in points]
    lines: list[tuple[Spot, Spot]] = []
    for family, others in dict.fromkeys((point.family, point.others) for point in points):
        own = [index for index, point in enumerate(points) if (point.family, point.others) == (family, others)]
        if len(own) > 1:
            axes.plot(
                [points[index].parameters for index in own],
                [points[index].value for index in own],
                color=LIGHT[looks[family][0]],
                alpha=0.7,
                linestyle=(0, (6, 3)) if others else "solid",
                gid=".line",
            )
            lines += itertools.pairwise(places[index] for index in own)
    bars = []
    for point, (x, _) in zip(points, places, strict=True):
        _mark(point, looks[point.family], axes)
        if _is_long(point):
            low, high = (axes.transData.transform((point.parameters, end))[1] for end in point.ends or ())
            bars.append(Box(x - 4, low, 8, high - low))
    # A label may stand a little above the area, but not on the axis.
    free = Box(area.x + 2, area.y + 2, area.width - 2, area.height + 10)
    boxes = placed(places, [point.label for point in points], free, bars, lines)
    for point, place, box in zip(points, places, boxes, strict=True):
        _label(point.label, place, box, LIGHT[looks[point.family][0]], figure)
    return svg(figure, f"{name} against trainable parameters", titles=[point.title for point in points])


def _mark(point: Point, look: tuple[str, str, float], axes: Axes) -> None:
    """The point with its interval."""
    name, marker, size = look
    colour = LIGHT[name]
    if point.ends is not None and _is_long(point):
        beyond = [[point.value - point.ends[0]], [point.ends[1] - point.value]]
        drawn = axes.errorbar(point.parameters, point.value, beyond, fmt="none", color=colour, capsize=4, alpha=0.65)
        drawn.lines[2][0].set_gid(".interval")
    axes.plot(
        point.parameters,
        point.value,
        marker,
        markersize=size,
        markerfacecolor=LIGHT["page"] if point.others else colour,
        markeredgecolor=colour,
        markeredgewidth=1.6,
        clip_on=False,
        zorder=3,
        gid=".mark",
    )


def _is_long(point: Point) -> bool:
    """Whether the point has an interval with a length."""
    return point.ends is not None and point.ends[0] < point.ends[1]


def _label(label: str, place: Spot, box: Box, colour: str, figure: Figure) -> None:
    """Draw the text in its box, on the side of its point, with a thin line to a point that is far away."""
    near = box.nearest(place)
    side, x = "center", box.x + box.width / 2
    if box.x >= place[0]:
        side, x = "left", box.x
    elif box.x + box.width <= place[0]:
        side, x = "right", box.x + box.width
    if math.dist(place, near) > 10:
        line = Line2D(*zip(place, near, strict=True), color=colour, alpha=0.5, linewidth=0.8, transform=None)
        figure.add_artist(line)
    baseline = box.y + LINE - 10
    figure.text(x, baseline, label, transform=None, ha=side, color=colour, gid=".label", parse_math=False)


def _across(counts: Sequence[int], axes: Axes) -> None:
    """The axis of the parameters: logarithmic, with 0 on its left if some method trains none."""
    logs = [math.log10(count) for count in counts if count]
    if not logs:
        axes.set_xlim(-0.05, 1)
        axes.set_xticks([0])
        return
    low, high = (10**limit for limit in _range(logs))
    powers = [one for one in LogLocator(numticks=15).tick_values(low, high) if low <= one <= high]
    between = [one for one in LogLocator(subs=range(2, 10), numticks=15).tick_values(low, high) if low <= one <= high]
    if len(logs) == len(counts):
        axes.set_xscale("log")
        axes.set_xlim(low, high)
    else:
        # Linear from 0 to `low`, which appears as a break; logarithmic from `low` on.
        axes.set_xscale("symlog", linthresh=low, linscale=0.9 * _ZERO)
        axes.set_xlim(-low / 3, high)
        for share in (0.5, 0.6):  # the two strokes of a broken axis
            axes.plot(
                share * low,
                0,
                marker=[(-0.5, -1), (0.5, 1)],
                markersize=10,
                markeredgewidth=1,
                clip_on=False,
                color=LIGHT["soft"],
                transform=axes.get_xaxis_transform(),
            )
        powers = [0, *powers]
    # Set after the scale, because the scale sets its own.
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short_count(count)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_locator(FixedLocator(powers))
    axes.xaxis.set_minor_locator(FixedLocator(between))


def _upwards(points: Sequence[Point], axes: Axes) -> None:
    """The axis of the metric, a little longer than the data."""
    ends = [end for point in points for end in (point.value, *(point.ends or ()))]
    margin = 0.07 * (max(ends) - min(ends)) or 0.05 * abs(max(ends)) or 1.0
    axes.set_ylim(min(ends) - margin, max(ends) + margin)
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], min_n_ticks=4))
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _range(logs: Sequence[float]) -> tuple[float, float]:
    """The range of the axis: a little more than the data, and wide enough for two powers of ten."""
    margin = max(0.06 * (max(logs) - min(logs)), 0.1)
    low, high = max(min(logs) - margin, 0.0), max(logs) + margin
    if math.floor(high) - math.ceil(low) < 1:
        low, high = float(math.floor(low)), float(math.ceil(high))
        high += low == high
    return low, high


def _parts(method: str) -> tuple[str, str, str]:
    """The family, the size (the first setting), and the other settings of a method such as "lora rank=8 targets=q".

    "dora rank=8" belongs to LoRA's family, with another setting, so each kind of method has one colour.
    """
    name, _, settings = method.partition(" ")
    size, _, others = settings.partition(" ")
    if name in ("rslora", "dora", "pissa"):
        return "lora", size, f"{name} {others}".rstrip()
    return name, size, others


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"
