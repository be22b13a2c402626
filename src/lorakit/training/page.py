"""report.html, a self-contained page of a run: loss curves, answers before and after, and how far each weight moved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator
from torch import nn

from ..core.attach import adapted_layers
from . import html
from .colours import LIGHT
from .report import Evaluation, Sample, metrics_table
from .svg import new_figure, styled, svg


@dataclass(frozen=True)
class Change:
    """How far one weight has moved: ‖g⊙(W + s·ΔW) − W‖ / ‖W‖ in the Frobenius norm."""

    name: str
    ratio: float


@torch.no_grad()
def weight_changes(model: nn.Module) -> list[Change]:
    """The relative change of each adapted layer's weight, in the model's order."""
    changes = []
    for name, layer in adapted_layers(model).items():
        weight = layer.base_matrix()
        changes.append(Change(name, float((layer.adapted_matrix() - weight).norm() / weight.norm().clamp_min(1e-30))))
    return changes


def render(
    *,
    title: str,
    summary: str,
    history: Sequence[dict[str, float]],
    result: Evaluation | None,
    changes: Sequence[Change],
) -> str:
    """The page as HTML. summary: the text that a run starts with. history: the lines of metrics.jsonl."""
    return html.fill_template(
        "report.html.j2",
        title=title,
        summary=summary,
        curves=curves(history),
        result=result,
        metrics=metrics_table(result).rows if result is not None else (),
        answered=_answered(result) if result is not None else [],
        changes=changes,
        largest=max((change.ratio for change in changes), default=0.0),
    )


@styled()
def curves(history: Sequence[dict[str, float]]) -> Markup:
    """Training and held-out loss over steps; empty if there are too few points for a curve."""
    figure = new_figure(480, 240)
    axes = figure.add_axes((0.1, 0.16, 0.85, 0.73))
    points = []
    for key, name, colour, marker in (("loss", "training", "blue", ""), ("eval_loss", "held-out", "orange", "o")):
        line = [(one["step"], one[key]) for one in history if key in one and math.isfinite(one[key])]
        points += line
        if line:
            steps, losses = zip(*line, strict=True)
            axes.plot(
                steps,
                losses,
                color=LIGHT[colour],
                marker=marker,
                markersize=4,
                clip_on=False,
                label=name,
                gid=f".{name}",
            )
    if len(points) < 2:
        return Markup()
    axes.set_xlim(0, max(step for step, _ in points))
    axes.set_ylim(bottom=min(0, *(loss for _, loss in points)))
    axes.set_xlabel("step")
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="upper right", ncols=2)
    return svg(figure, "Loss over steps")


def _answered(result: Evaluation) -> list[tuple[Sample, bool]]:
    """Samples in reading order: up to four wrong ones first, then the right ones, then the other wrong ones."""
    pairs = list(zip(result.samples, result.right, strict=True))
    wrong, good = ([pair for pair in pairs if pair[1] == right] for right in (False, True))
    return [*wrong[:4], *good, *wrong[4:]]
