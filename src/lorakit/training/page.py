"""report.html: one self-contained page of a run. Its loss curves, answers before and after, and what changed where.

Drawn as SVG by hand, so that the page needs no script, no network and no plotting library.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..core.attach import adapted_layers
from ..core.matrix import precise
from .report import Comparison, metric_value

# The colours of a page, light or dark; a drawing that is a file of its own takes them too.
COLOURS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #6a737d; --line: #d8dde3; --page: #fff;
  --a: #2563eb; --b: #d97706; --right: #15803d }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #9aa4ae; --line: #3a4149; --page: #16191d;
  --a: #6ea8fe; --b: #f0a94a; --right: #4ade80 } }
"""
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums } td code { overflow-wrap: anywhere }
code, pre { font: .82rem/1.45 ui-monospace, monospace }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line) }
.big { font-size: 2rem; font-weight: 600 } .soft, .wrong { color: var(--soft) } .right { color: var(--right) }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif }
.bar { background: var(--a); height: .7rem; border-radius: 2px }
"""


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
        weight = layer.matrix(precise(layer.weight))
        changes.append(Change(name, float((layer.adapted_matrix() - weight).norm() / weight.norm().clamp_min(1e-30))))
    return changes


def render(
    *,
    title: str,
    summary: str,
    history: Sequence[dict[str, float]],
    result: Comparison | None,
    changes: Sequence[Change],
) -> str:
    """The page as HTML. summary: the text a run starts with. history: the lines of metrics.jsonl."""
    sections = [f"<h1>{html.escape(title)}</h1>"]
    if result is not None and result.rows:
        sections.append(_result(result))
    sections.append(f"<h2>Loss</h2>{curves(history)}")
    if changes:
        sections.append(f"<h2>What changed in the weights</h2>{_changes(changes)}")
    sections.append(f"<h2>The run</h2><pre>{html.escape(summary.strip())}</pre>")
    return document(title, sections)


def document(title: str, sections: Sequence[str], style: str = "") -> str:
    """A whole page, light or dark as its reader's screen is, from pieces of HTML and CSS of their own."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{COLOURS}{_STYLE}{style}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def curves(history: Sequence[dict[str, float]], width: int = 760, height: int = 260) -> str:
    """Training and held-out loss over steps as an SVG drawing; a sentence where there is nothing to draw."""
    series = {
        "training": [(line["step"], line["loss"]) for line in history if "loss" in line],
        "held-out": [(line["step"], line["eval_loss"]) for line in history if "eval_loss" in line],
    }
    points = [point for line in series.values() for point in line if math.isfinite(point[1])]
    if len(points) < 2:
        return "<p class=soft>Too few steps for a curve.</p>"
    left, right, top, bottom = 46, 14, 10, 34
    last = max(step for step, _ in points)
    ceiling = max(value for _, value in points) * 1.05

    def at(step: float, value: float) -> str:
        x = left + (width - left - right) * step / max(last, 1)
        y = top + (height - top - bottom) * (1 - value / ceiling)
        return f"{x:.1f},{y:.1f}"

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="Loss over steps">']
    for tick in _ticks(ceiling):
        y = at(0, tick).split(",")[1]
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{y}" y2="{y}" stroke="var(--line)"/>')
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end" dominant-baseline="middle">{tick:g}</text>')
    for tick in _ticks(last):
        x = at(tick, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - 2}" text-anchor="middle">step</text>')
    for index, (name, line) in enumerate(series.items()):
        if not line:
            continue
        colour = ("var(--a)", "var(--b)")[index]
        path = " ".join(at(step, value) for step, value in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if index:
            parts += [
                f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3.5" fill="{colour}"/>' for p in path.split()
            ]
        row = 22 + 18 * index
        parts.append(
            f'<line x1="{width - 110}" x2="{width - 90}" y1="{row}" y2="{row}" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{width - 84}" y="{row}" dominant-baseline="middle">{name}</text>')
    return "".join([*parts, "</svg>"])


def _result(result: Comparison) -> str:
    parts = [f"<p class=soft>{result.rows} held-out rows ({html.escape(result.split)})</p>"]
    for name, (before, after) in result.metrics.items():
        shown = f"{metric_value(name, before)} → {metric_value(name, after)}"
        parts.append(f"<p><span class=big>{shown}</span> {html.escape(name)}, base → adapter</p>")
    pairs = list(zip(result.samples, result.right, strict=True))
    # What went wrong is looked for first: up to four such rows, then right ones, eight in sight.
    wrong, good = ([pair for pair in pairs if pair[1] == right] for right in (False, True))
    rows = []
    for sample, right in [*wrong[:4], *good, *wrong[4:]]:
        mark = "<span class=right>✓</span>" if right else "<span class=wrong>✗</span>"
        texts = (sample.prompt, sample.base, sample.adapter, sample.expected)
        cells = "".join(f"<td><code>{html.escape(text.strip()[:600])}</code></td>" for text in texts)
        rows.append(f"<tr><td>{mark}</td>{cells}</tr>")
    head = "<tr><th></th><th>asked</th><th>base</th><th>adapter</th><th>expected</th></tr>"
    visible, rest = rows[:8], rows[8:]
    if rows:
        parts.append(f"<h2>Before and after</h2><table>{head}{''.join(visible)}</table>")
    if rest:
        parts.append(f"<details><summary>{len(rest)} more</summary><table>{head}{''.join(rest)}</table></details>")
    return "".join(parts)


def _changes(changes: Sequence[Change]) -> str:
    largest = max(change.ratio for change in changes) or 1.0
    rows = "".join(
        f"<tr><td><code>{html.escape(change.name)}</code></td><td class=n>{change.ratio:.4f}</td>"
        f'<td style="width:40%"><div class=bar style="width:{100 * change.ratio / largest:.1f}%"></div></td></tr>'
        for change in changes
    )
    mean = sum(change.ratio for change in changes) / len(changes)
    return (
        f"<p>‖ΔW‖ / ‖W‖ of the {len(changes)} adapted weights: {mean:.4f} on average, {largest:.4f} at most.</p>"
        f"<details><summary>each of them</summary><table>{rows}</table></details>"
    )


def _ticks(limit: float) -> list[float]:
    """A few round numbers from 0 up to `limit`."""
    step = 10 ** math.floor(math.log10(max(limit, 1e-9) / 2))
    while limit / step > 6:
        step *= 2 if limit / step <= 12 else 5
    return [index * step for index in range(int(limit / step) + 1)]
