"""report.html, the page of a run: score, loss, where the update went, every answer beside the expected one.

It is one file, with a few lines of script for the filter and the search of the answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..core.numbers import short_number
from ..core.table import Table
from . import html
from .changes import Change, by_kind, by_layer, together
from .colours import LIGHT
from .differences import Piece, word_differences
from .report import Evaluation, Sample, interval, is_share, metric_value, one_line
from .svg import new_figure, styled, svg
from .tried import Tried

_LONGEST = 4000  # characters of a text that are shown
_LONGEST_NAME, _NAMES_IN_A_ROW = 14, 3  # characters of an adapter's name in a legend, which has two rows
_LINES = (("loss", "training", "blue", ""), ("eval_loss", "held-out", "orange", "o"))
_STACKS = ("blue", "orange", "green", "violet")  # the colours of a model's stacks of layers
_ADAPTERS = ("blue", "orange", "green", "violet", "red", "cyan")  # of the curves of adapters; no more are drawn


@dataclass(frozen=True)
class Shown:
    """A metric as the page shows it. Shares have places on a scale from 0 to 100: value, lower end, upper end."""

    name: str
    values: tuple[str, str]  # base, adapter
    interval: tuple[str, ...]  # the same of the 95 % intervals; empty if they are not known
    places: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """A held-out row as the page shows it. right: None where an answer is neither right nor wrong."""

    asked: str
    base: str
    adapter: Sequence[Piece]
    expected: Sequence[Piece]
    right: bool | None


def render(
    *,
    title: str,
    facts: Mapping[str, str],
    command: str,
    settings: Table,
    summary: str,
    history: Sequence[Mapping[str, float]],
    result: Evaluation | None,
    changes: Sequence[Change],
    tried: Tried | None = None,
    adapters: Table | None = None,
) -> str:
    """The page as HTML. facts: what is known of the run, by name. command: what makes it again. settings: all of them.
    summary: the text that a run starts with. history: the lines of metrics.jsonl. tried: the settings among which those
    of the run were chosen. adapters: what each came to of those that the rows name.
    """
    names = [] if adapters is None else [name for name, *_ in adapters.rows]
    answered = answers_of(result) if result is not None else []
    return html.fill_template(
        "report.html.j2",
        title=title,
        facts=facts,
        command=command,
        settings=settings,
        summary=summary,
        curves=curves(history, names),
        adapters=adapters,
        drawn=min(len(names), len(_ADAPTERS)),
        result=result,
        metrics=[_shown(result, name) for name in result.metrics] if result is not None else [],
        answered=answered,
        wrong=sum(answer.right is False for answer in answered),
        judged=any(answer.right is not None for answer in answered),
        kinds=by_kind(changes),
        layers=layer_bars(by_layer(changes)),
        whole=together("", changes) if changes else None,
        tried=tried,
    )


@styled()
def curves(history: Sequence[Mapping[str, float]], adapters: Sequence[str] = ()) -> Markup:
    """Training and held-out loss over steps, on a logarithmic scale; empty if there are too few points for a curve.

    adapters: the names of those whose own losses are drawn; of many, the first ones. Otherwise the last value of each
    line stands in the legend. A loss of 0 has no place on the scale: the line leaves it downwards.
    """
    figure = new_figure(440, 260)
    axes = figure.add_axes((0.1, 0.155, 0.87, 0.66 if len(adapters) > _NAMES_IN_A_ROW else 0.72))
    points: list[tuple[float, float]] = []
    named = []
    for name, colour in zip(adapters, _ADAPTERS, strict=False) if adapters else [("", "")]:
        own = []
        for kind, said, usual, marker in _LINES:
            key = f"{kind} {name}" if name else kind
            line = [(one["step"], one[key]) for one in history if key in one and math.isfinite(one[key])]
            points += line
            if not line:
                continue
            steps, losses = zip(*line, strict=True)
            label = one_line(name, _LONGEST_NAME) or f"{said}: {short_number(losses[-1])} at the end"
            drawn: dict[str, Any] = {
                "color": LIGHT[colour or usual],
                "marker": marker,
                "markersize": 4,
                "gid": f".{said} {name}".strip(),
            }
            own += axes.plot(steps, losses, label=label, **drawn)
        named += own[:1] if name else own
    if len(points) < 2:
        return Markup()
    axes.set_xlim(0, max(step for step, _ in points))
    _upwards([loss for _, loss in points], axes)
    axes.set_xlabel("step")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(handles=named, loc="upper right", ncols=_NAMES_IN_A_ROW if adapters else 2)
    return svg(figure, "Loss over steps")


def _upwards(losses: Sequence[float], axes: Axes) -> None:
    """The axis of the loss: logarithmic, with numbers at round values; linear if no loss is above 0."""
    above = [loss for loss in losses if loss > 0]
    if not above:
        axes.set_ylim(-1, 1)
        return
    low, high = min(above) / 1.15, max(above) * 1.15
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(low, high)
    # Over less than a decade, powers of ten and their doubles would be one or two numbers.
    few = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
    axes.yaxis.set_major_locator(few if high < 8 * low else LogLocator(subs=(1, 3) if high < 2e3 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:.3g}"))


@styled()
def layer_bars(stacks: Mapping[str, Sequence[Change]]) -> Markup:
    """A bar for each layer: ‖ΔW‖ / ‖W‖ over its adapted weights. Empty for a single layer."""
    layers = [(stack, group) for stack, groups in stacks.items() for group in groups]
    if len(layers) < 2:
        return Markup()
    figure = new_figure(440, 180)
    axes = figure.add_axes((0.1, 0.22, 0.87, 0.6 if len(stacks) > 1 else 0.74))
    for number, (stack, groups) in enumerate(stacks.items()):
        places = [place for place, (own, _) in enumerate(layers) if own == stack]
        axes.bar(
            places,
            [100 * group.ratio for group in groups],
            color=LIGHT[_STACKS[number % len(_STACKS)]],
            width=0.7,
            label=stack,
            gid=".layer",
        )
    axes.set_xlim(-0.6, len(layers) - 0.4)
    axes.set_xlabel("layer")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda place, _: layers[round(place)][1].name if 0 <= place < len(layers) else "")
    )
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}%"))
    if len(stacks) > 1:
        figure.legend(loc="upper right", ncols=len(stacks))
    return svg(figure, "‖ΔW‖ / ‖W‖ of each layer")


def answers_of(result: Evaluation) -> list[Answer]:
    """The rows as they are read: wrong ones first, and numbers by how far they are off."""
    if result.right:
        pairs = sorted(zip(result.samples, result.right, strict=True), key=lambda pair: pair[1])
        return [_answer(sample, right) for sample, right in pairs]
    numbers = "pearson" in result.metrics
    return [_answer(sample, None) for sample in (sorted(result.samples, key=_off) if numbers else result.samples)]


def _answer(sample: Sample, right: bool | None) -> Answer:
    texts = [_cut(text.strip()) for text in (sample.prompt, sample.base, sample.adapter, sample.expected)]
    asked, base, adapter, expected = texts
    # A right answer may be other text: JSON is compared as data. There is nothing to mark then.
    pieces = word_differences(adapter, expected) if right is False else ([(adapter, False)], [(expected, False)])
    return Answer(asked, base, *pieces, right)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text):,} characters)"


def _off(sample: Sample) -> float:
    return -abs(float(sample.adapter) - float(sample.expected))


def _shown(result: Evaluation, name: str) -> Shown:
    base, adapter = result.metrics[name]
    places: tuple[tuple[float, float, float], ...] = ()
    if is_share(name) and name in result.intervals:
        ends = result.intervals[name]
        places = ((100 * base, 100 * ends[0][0], 100 * ends[0][1]), (100 * adapter, 100 * ends[1][0], 100 * ends[1][1]))
    return Shown(name, (metric_value(name, base), metric_value(name, adapter)), interval(result, name), places)
