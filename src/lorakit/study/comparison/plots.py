"""A metric against the trained parameters, as in figure 2 of the LoRA paper, drawn as SVG by hand.

    x   log₁₀ of the parameters; a method that trains none but the head stands to the left of the axis' break, at 0
    y   the mean over the seeds with its interval, fitted to the data

A family of methods ("lora") has one colour and one marker, hollow where other settings than the size are changed.
Members that differ in their size alone are joined by a line, and only the smallest of them is labelled in full. A label
is put near its point where least lies under it: all places are tried, the most crowded point first, and twice.
"""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...core.numbers import number, short_count
from ...training.page import COLOURS
from .results import Comparison, TaskFacts
from .table import higher_is_better, rows_of

_LIGHT = ("#2563eb", "#b45309", "#15803d", "#7c3aed", "#dc2626", "#0e7490", "#be185d", "#64748b", "#1b1f24")
_DARK = ("#6ea8fe", "#f0a94a", "#4ade80", "#b794f6", "#f87171", "#22d3ee", "#f472b6", "#94a3b8", "#e6e8eb")
_MARKERS = (  # all of about the same area, around 0, 0
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",  # circle
    "M-3.6-3.6h7.2v7.2h-7.2z",  # square
    "M0-5.2L5.2 0 0 5.2-5.2 0z",  # diamond
    "M0-5L5 3.8H-5z",  # triangle
    "M0 5L5-3.8H-5z",  # triangle on its tip
    "M-1.7-5h3.4v3.3H5v3.4H1.7V5h-3.4V1.7H-5v-3.4h3.3z",  # plus
    "M-5 0L-2.5-4.3h5L5 0 2.5 4.3h-5z",  # hexagon
    "M-5 0L3.8-5v10z",  # triangles to the left and to the right
    "M5 0L-3.8-5v10z",
)


def _variables(colours: Sequence[str]) -> str:
    return ":root { " + "; ".join(f"--f{index}: {colour}" for index, colour in enumerate(colours)) + " }"


# What a page with such drawings needs beside `COLOURS`.
STYLE = f"""
{_variables(_LIGHT)}
@media (prefers-color-scheme: dark) {{ {_variables(_DARK)} }}
.plot {{ max-width: 56rem; height: auto }}
.plot text {{ fill: var(--soft); font: 12px system-ui, sans-serif }}
.plot .label {{ fill: currentColor; stroke: var(--page); stroke-width: 3px; paint-order: stroke }}
"""

_WIDTH, _HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 744, 34, 392  # of the area that is drawn in
_ZERO = 48  # pixels between "0" and the axis
_CHARACTER, _LINE = 6.6, 13.0  # width and height of a label's letters at 12 px, rather too much than too little
_LONGEST = 40  # characters of a label
_RADII = (9.0, 15.0, 24.0, 36.0, 50.0, 68.0, 90.0, 120.0)  # from a point to its label
_DIRECTIONS = ((1, 0), (-1, 0), (0, -1), (0, 1), (0.8, -0.8), (-0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))


@dataclass(frozen=True)
class Point:
    """A method in the drawing."""

    label: str
    family: str  # one colour and one marker
    others: str  # settings beside the size: points of a family with the same ones are a line
    parameters: int
    value: float
    half: float | None  # of its interval
    title: str  # shown when pointed at


@dataclass(frozen=True)
class Box:
    """A rectangle, x to the right and y downwards."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0.0) * max(height, 0.0)

    def holds(self, spot: tuple[float, float]) -> bool:
        return self.x < spot[0] < self.x + self.width and self.y < spot[1] < self.y + self.height

    def nearest(self, spot: tuple[float, float]) -> tuple[float, float]:
        """The point of the box that is nearest to `spot`."""
        return min(max(spot[0], self.x), self.x + self.width), min(max(spot[1], self.y), self.y + self.height)


def points_of(comparison: Comparison, task: TaskFacts) -> list[Point]:
    """The methods that have the task's first metric."""
    metric = task.metrics[0]
    rows = [row for row in rows_of(comparison, task) if metric in row.scores]
    points: list[Point] = []
    labelled: set[tuple[str, str]] = set()
    for row in sorted(rows, key=lambda row: row.parameters):
        interval = row.scores[metric]
        if not math.isfinite(interval.mean):
            continue
        name, size, others = _parts(row.method)
        half = f" ± {number(interval.half)}" if interval.half is not None else ""
        points.append(
            Point(
                label=_shortened(size if (name, others) in labelled else row.method),
                family=name,
                others=others,
                parameters=row.parameters,
                value=interval.mean,
                half=interval.half,
                title=f"{row.method}: {number(interval.mean, 4)}{half}, {row.parameters:,} parameters",
            )
        )
        labelled.add((name, others))
    return points


def families(comparison: Comparison) -> list[str]:
    """In the order of their colours, which is the same in the drawings of all tasks: LoRA, then as they come."""
    found = dict.fromkeys(_parts(row.method)[0] for row in comparison.rows)
    return sorted(found, key=lambda family: family != "lora")


def scatter(points: Sequence[Point], metric: str, families: Sequence[str]) -> str:
    """The drawing, for a page with `STYLE`; a sentence where there is nothing to draw."""
    if not points:
        return "<p>No method has a score to draw.</p>"
    axes = _Axes(points)
    places = [(axes.x(point.parameters), axes.y(point.value)) for point in points]
    name = html.escape(metric if higher_is_better(metric) else f"{metric} (lower is better)")
    colours = {family: f"var(--f{families.index(family) % len(_LIGHT)})" for family in families}
    drawn: list[str] = []
    bars: list[Box] = []
    segments: list[tuple[tuple[float, float], tuple[float, float]]] = []
    for line in dict.fromkeys((point.family, point.others) for point in points):
        own = [place for point, place in zip(points, places, strict=True) if (point.family, point.others) == line]
        if len(own) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in own)
            dashes = ' stroke-dasharray="6 3"' if line[1] else ""
            drawn.append(
                f'<polyline points="{path}" fill="none" stroke="{colours[line[0]]}" stroke-width="1.5" '
                f'stroke-opacity="0.7"{dashes}/>'
            )
            segments += itertools.pairwise(own)
    for point, (x, y) in zip(points, places, strict=True):
        marks = ""
        if point.half:
            high, low = axes.y(point.value + point.half), axes.y(point.value - point.half)
            bars.append(Box(x - 4, high, 8, low - high))
            marks = (
                f'<path class="interval" d="M{x - 4:.1f} {high:.1f}h8m-4 0V{low:.1f}m-4 0h8" fill="none" '
                f'stroke="currentColor" stroke-opacity="0.65"/>'
            )
        shape = _MARKERS[families.index(point.family) % len(_MARKERS)]
        fill = 'fill="var(--page)" stroke="currentColor" stroke-width="1.6"' if point.others else 'fill="currentColor"'
        drawn.append(
            f'<g style="color:{colours[point.family]}"><title>{html.escape(point.title)}</title>{marks}'
            f'<path class="mark" transform="translate({x:.1f} {y:.1f})" d="{shape}" {fill}/></g>'
        )
    boxes = _placed(places, [point.label for point in points], bars, segments)
    for point, (x, y), box in zip(points, places, boxes, strict=True):
        drawn.append(_label(point.label, x, y, box, colours[point.family]))
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{name} against trainable parameters">{axes.drawn(name)}{"".join(drawn)}</svg>'
    )


def standalone(svg: str) -> str:
    """The drawing as a file of its own, with its colours, light and dark."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" '
    page = f'<style>{COLOURS}{STYLE}</style><rect width="{_WIDTH}" height="{_HEIGHT}" fill="var(--page)"/>'
    opening, rest = svg.removeprefix("<svg ").split(">", 1)
    return f"{head}{opening}>{page}{rest}\n"


class _Axes:
    """Where a number of parameters and a score lie in the drawing."""

    def __init__(self, points: Sequence[Point]) -> None:
        logs = [math.log10(point.parameters) for point in points if point.parameters]
        self.zero = len(logs) < len(points)
        self.start = _LEFT + (_ZERO if self.zero else 0)  # of the axis
        self.low, self.high = _range(logs) if logs else (0.0, 0.0)
        ends = [point.value + sign * (point.half or 0.0) for point in points for sign in (-1, 1)]
        least, most = min(ends), max(ends)
        margin = 0.07 * (most - least) or 0.05 * abs(most) or 1.0
        self.bottom, self.top = least - margin, most + margin

    def x(self, parameters: int) -> float:
        if not parameters:
            return _LEFT + 16
        return self.start + (_RIGHT - self.start) * (math.log10(parameters) - self.low) / (self.high - self.low)

    def y(self, value: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (value - self.bottom) / (self.top - self.bottom)

    def drawn(self, metric: str) -> str:
        """Lines, ticks and names, below everything else."""
        parts = [f'<text x="8" y="16">{metric}</text>']
        step, first, last, digits = _steps(self.bottom, self.top)
        for tick in range(first, last + 1):
            y = self.y(tick * step)
            parts.append(f'<path d="M{_LEFT} {y:.1f}H{_RIGHT}" stroke="var(--line)"/>')
            parts.append(
                f'<text class="y" x="{_LEFT - 8}" y="{y:.1f}" dy="4" text-anchor="end">{tick * step:.{digits}f}</text>'
            )
        axis = f"M{self.start} {_BOTTOM}H{_RIGHT}" if self.high else ""
        if self.zero:
            x = self.x(0)
            parts.append(_tick(x, "0"))
            # The two strokes of a broken axis lie between its pieces.
            broken = self.start - 8
            axis = f"M{_LEFT} {_BOTTOM}H{broken}" + (f"m-3 5l6-10m1 10l6-10{axis}" if axis else f"H{_RIGHT}")
        exponent = math.floor(self.low)
        while self.high and exponent <= self.high:
            for digit in range(1, 10):
                if self.low <= exponent + math.log10(digit) <= self.high:
                    x = self.x(digit * 10**exponent)
                    if digit == 1:
                        parts.append(_tick(x, short_count(10**exponent)))
                    else:
                        axis += f"M{x:.1f} {_BOTTOM}v3"
            exponent += 1
        parts.append(f'<path d="{axis}" fill="none" stroke="var(--soft)"/>')
        parts.append(
            f'<text x="{(_LEFT + _RIGHT) / 2:g}" y="{_HEIGHT - 8}" text-anchor="middle">trainable parameters</text>'
        )
        return "".join(parts)


def _tick(x: float, label: str) -> str:
    return (
        f'<path d="M{x:.1f} {_BOTTOM}v6" stroke="var(--soft)"/>'
        f'<text class="x" x="{x:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{label}</text>'
    )


def _range(logs: Sequence[float]) -> tuple[float, float]:
    """Of the axis: a little more than the data, and wide enough for two powers of ten."""
    margin = max(0.06 * (max(logs) - min(logs)), 0.1)
    low, high = max(min(logs) - margin, 0.0), max(logs) + margin
    if math.floor(high) - math.ceil(low) < 1:
        low, high = float(math.floor(low)), float(math.ceil(high))
        high += low == high
    return low, high


def _steps(low: float, high: float) -> tuple[float, int, int, int]:
    """Four to nine round numbers from `low` to `high`: their step, the first and last in steps, and their decimals."""
    power = math.floor(math.log10((high - low) / 4))
    step = max(
        (factor * 10.0**power for factor in (1, 2, 5) if factor * 10.0**power <= (high - low) / 4),
    )
    return step, math.ceil(low / step), math.floor(high / step), max(-power, 0)


def _parts(method: str) -> tuple[str, str, str]:
    """The family, the size, which is the first setting, and the other settings of "lora rank=8 targets=q_proj".

    "dora rank=8" is of LoRA's family, with another setting: so there are as many colours as there are kinds of method.
    """
    name, _, settings = method.partition(" ")
    size, _, others = settings.partition(" ")
    if name in ("rslora", "dora", "pissa"):
        return "lora", size, f"{name} {others}".rstrip()
    return name, size, others


def _shortened(label: str) -> str:
    return label if len(label) <= _LONGEST else label[: _LONGEST - 1] + "…"


def _placed(
    places: Sequence[tuple[float, float]],
    labels: Sequence[str],
    bars: Iterable[Box],
    segments: Sequence[tuple[tuple[float, float], tuple[float, float]]],
) -> list[Box]:
    """A box for each label beside its place."""
    fixed = [*bars, *(Box(x - 6, y - 6, 12, 12) for x, y in places)]
    lines = [spot for a, b in segments for spot in _between(a, b)]
    boxes: dict[int, Box] = {}

    def crowd(index: int) -> float:
        return min((math.dist(places[index], other) for i, other in enumerate(places) if i != index), default=0.0)

    def best(index: int) -> Box:
        others = [box for other, box in boxes.items() if other != index]
        leaders = [
            spot for i, box in boxes.items() if i != index for spot in _between(places[i], box.nearest(places[i]))
        ]
        choices: list[tuple[float, int, Box]] = []
        for radius, box in _around(places[index], _CHARACTER * len(labels[index])):
            under = sum(box.overlap(other) for other in (*fixed, *others))
            lined = sum(box.holds(spot) for spot in (*lines, *leaders))
            leader = _between(places[index], box.nearest(places[index]))
            crossed = sum(other.holds(spot) for spot in leader for other in others)
            choices.append((100 * under + 6 * lined + 40 * crossed + radius, len(choices), box))
        return min(choices)[2]

    # What was put first did not know of what came later, so each may move once more.
    for index in 2 * sorted(range(len(places)), key=crowd):
        boxes[index] = best(index)
    return [boxes[index] for index in range(len(places))]


def _around(place: tuple[float, float], width: float) -> list[tuple[float, Box]]:
    """Where a label of this width may stand, with its distance."""
    x, y = place
    found = []
    for radius in _RADII:
        for right, down in _DIRECTIONS:
            left = x + right * radius + width * ((right > 0) - (right < 0) - 1) / 2
            top = y + down * radius - _LINE / 2
            left, top = min(max(left, _LEFT + 2), _RIGHT - width), min(max(top, _TOP - 12), _BOTTOM - _LINE - 2)
            found.append((radius, Box(left, top, width, _LINE)))
    return found


def _between(a: tuple[float, float], b: tuple[float, float]) -> list[tuple[float, float]]:
    """Points on the way from a to b, close enough for no label to lie on it unseen."""
    count = math.ceil(math.dist(a, b) / 6) or 1
    return [(a[0] + (b[0] - a[0]) * step / count, a[1] + (b[1] - a[1]) * step / count) for step in range(count + 1)]


def _label(label: str, x: float, y: float, box: Box, colour: str) -> str:
    """The text in its box, towards its point, and a thin line to it from far away."""
    near = box.nearest((x, y))
    anchor, at = "middle", box.x + box.width / 2
    if box.x >= x:
        anchor, at = "start", box.x
    elif box.x + box.width <= x:
        anchor, at = "end", box.x + box.width
    leader = ""
    if math.dist((x, y), near) > 10:
        leader = (
            f'<path d="M{x:.1f} {y:.1f}L{near[0]:.1f} {near[1]:.1f}" stroke="{colour}" stroke-opacity="0.5" '
            'stroke-width="0.8"/>'
        )
    return (
        f'{leader}<text class="label" x="{at:.1f}" y="{box.y + _LINE - 3:.1f}" text-anchor="{anchor}" '
        f'style="color:{colour}">{html.escape(label)}</text>'
    )
