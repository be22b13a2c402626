"""The plots of analysis.html: singular values as bars, φ as a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ...training.colours import LIGHT
from ...training.svg import new_figure, styled, svg

_MAP = "#3b82f6"  # of heat maps, whose pixels cannot use CSS variables; visible on light and on dark pages
_MARGIN = 24  # pixels beside a heat map, for its numbers


@styled()
def bars(values: Sequence[float], label: str, ceiling: float, width: int = 150, height: int = 60) -> Markup:
    """A bar for each value, from left to right. `ceiling` is the value at the top."""
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, max(len(values), 1)), ylim=(0, ceiling))
    axes.stairs(values, fill=True, facecolor=LIGHT["blue"], linewidth=0, gid=".bars")
    axes.set_axis_off()
    figure.add_artist(Line2D((0, width), (0, 0), color=LIGHT["line"], transform=None))
    return svg(figure, label, kind="small")


@styled()
def heat_map(phi: Sequence[Sequence[float]], label: str) -> Markup:
    """φ(i, j), i downwards, j to the right, from 0 (the page's colour) to 1 (full colour)."""
    rows, columns = len(phi), len(phi[0]) if phi else 0
    if not rows or not columns:
        figure = new_figure(64, _MARGIN)
        figure.text(0, 6, "ΔW = 0", transform=None, color=LIGHT["soft"])
        return svg(figure, label, kind="small")
    cell = max(2.0, min(10.0, 160 / max(rows, columns)))  # pixels
    width, height = columns * cell, rows * cell
    figure = new_figure(width + _MARGIN, height + _MARGIN)
    _coloured(figure, phi, (_MARGIN, _MARGIN, width, height))
    soft: dict[str, Any] = {"transform": None, "color": LIGHT["soft"]}
    figure.text(_MARGIN - 4, _MARGIN + height, "1", ha="right", va="top", **soft)
    figure.text(_MARGIN - 4, _MARGIN, f"{rows}", ha="right", va="bottom", **soft)
    figure.text(_MARGIN, _MARGIN - 5, "1", ha="left", va="top", **soft)
    figure.text(_MARGIN + width, _MARGIN - 5, f"{columns}", ha="right", va="top", **soft)
    return svg(figure, label, kind="small")


@styled()
def scale() -> Markup:
    """The colour scale of the heat maps."""
    figure = new_figure(200, 16)
    _coloured(figure, [[level / 20 for level in range(21)]], (16, 2, 168, 12))
    figure.text(12, 8, "0", transform=None, ha="right", va="center_baseline", color=LIGHT["soft"])
    figure.text(188, 8, "1", transform=None, ha="left", va="center_baseline", color=LIGHT["soft"])
    return svg(figure, "colours from 0 to 1", kind="small")


def _coloured(figure: Figure, cells: Sequence[Sequence[float]], box: tuple[float, float, float, float]) -> None:
    """An image with a pixel for each cell, whose opacity is the cell's number. box: left, bottom, width, height."""
    across, up = 72 * figure.get_size_inches()
    axes = figure.add_axes((box[0] / across, box[1] / up, box[2] / across, box[3] / up))
    axes.imshow([[to_rgba(_MAP, cell) for cell in row] for row in cells], interpolation="none", aspect="auto")
    axes.set_axis_off()
    figure.add_artist(Rectangle(box[:2], *box[2:], fill=False, edgecolor=LIGHT["line"], linewidth=1, transform=None))
