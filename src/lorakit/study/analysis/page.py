"""analysis.html: the tables of `lorakit analyze`, ΔW's singular values as bars, φ as heat maps (figures 3 and 4).

Drawn as SVG by hand in the style of a run's page, self-contained, light and dark: a cell of a heat map is the page's
colour with as much opacity as its number is large.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any

from ...core.numbers import number
from ...training.page import document
from .measures import Analysis, Similarity
from .report import (
    SIMILARITY_COLUMNS,
    SIMILARITY_LEGEND,
    Column,
    Item,
    Study,
    by_change,
    change_columns,
    change_legend,
    change_of,
    grouped,
    likeness,
    mean,
    ordered,
)

_DRAWN = 240  # matrices drawn by themselves, the most changed or most alike ones
_LEVELS = 20  # of a heat map's colour
_MAPS = (("A", "A"), ("right", "ΔW, input"), ("left", "ΔW, output"))  # of a `Similarity`: field, caption
_FIGURES = '<div style="display:flex;flex-wrap:wrap;gap:1rem 1.5rem;margin:.6rem 0">{}</div>'


def render(study: Study) -> str:
    """The page as HTML."""
    modules = by_change(study.modules)
    facts = [f"{len(modules)} matrices", f"base weights: {study.base}" if study.base else "without base weights"]
    sections = [
        f"<h1>What {html.escape(study.adapter)} did</h1>",
        f"<p class=soft>{html.escape('; '.join(facts))}</p>",
        *(f"<p>{html.escape(note)}</p>" for note in study.notes),
        "<h2>What changed</h2>",
        "<p class=soft>Means over the matrices whose names differ in their numbers alone, the most changed first.</p>",
        _table(ordered(grouped(modules), change_of), change_columns(study), change_legend(study)),
    ]
    if study.base is not None:
        sections += ["<h2>Amplification</h2>", _amplification(modules)]
    sections += ["<h2>Singular values of ΔW</h2>", _spectra(study)]
    if study.similarities:
        sections += [f"<h2>The same directions as {html.escape(study.other or '')}?</h2>", _similarities(study)]
    return document(f"What {study.adapter} did", sections)


def heat_map(phi: Sequence[Sequence[float]], label: str) -> str:
    """φ(i, j) as an SVG drawing, i downwards, j to the right, from 0 (the page) to 1 (full colour).

    Cells of one level are one path, and neighbours in a row one rectangle: 16 × 16 cells take some hundred bytes.
    """
    rows, columns = len(phi), len(phi[0]) if phi else 0
    if not rows or not columns:
        return "<p class=soft>ΔW = 0</p>"
    levels: dict[int, list[str]] = {}
    for i, row in enumerate(phi):
        start = 0
        for j in range(1, columns + 1):
            level = round(row[start] * _LEVELS)
            if j == columns or round(row[j] * _LEVELS) != level:
                if level:
                    levels.setdefault(level, []).append(f"M{start} {i}h{j - start}v1h{start - j}z")
                start = j
    paths = "".join(
        f'<path d="{"".join(pieces)}" fill-opacity="{level / _LEVELS:g}"/>' for level, pieces in sorted(levels.items())
    )
    scale = max(2.0, min(10.0, 160 / max(rows, columns)))  # pixels a cell
    width, height, margin = columns * scale, rows * scale, 24
    return (
        f'<svg width="{width + margin:g}" height="{height + margin:g}" role="img" aria-label="{html.escape(label)}">'
        f'<g transform="translate({margin} 0) scale({scale:g})" fill="var(--a)">{paths}</g>'
        f'<rect x="{margin}" width="{width:g}" height="{height:g}" fill="none" stroke="var(--line)"/>'
        f'<text x="{margin - 4}" y="11" text-anchor="end">1</text>'
        f'<text x="{margin - 4}" y="{height:g}" text-anchor="end">{rows}</text>'
        f'<text x="{margin}" y="{height + 15:g}">1</text>'
        f'<text x="{margin + width:g}" y="{height + 15:g}" text-anchor="end">{columns}</text></svg>'
    )


def bars(values: Sequence[float], label: str, ceiling: float, width: int = 150, height: int = 60) -> str:
    """Numbers as bars from the left, as high as their share of `ceiling`."""
    step = width / max(len(values), 1)
    rects = "".join(
        f'<rect x="{index * step:.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'y="{height * (1 - value / ceiling):.1f}" height="{height * value / ceiling:.1f}"/>'
        for index, value in enumerate(values)
    )
    return (
        f'<svg width="{width}" height="{height}" role="img" aria-label="{html.escape(label)}">'
        f'<g fill="var(--a)">{rects}</g><path d="M0 {height}h{width}" stroke="var(--line)"/></svg>'
    )


def _table(groups: dict[str, list[Item]], columns: Sequence[Column], legend: Sequence[tuple[str, str]]) -> str:
    head = "".join(f'<th style="text-align:right">{html.escape(column.head)}</th>' for column in columns)
    rows = []
    for name, own in groups.items():
        times = f" ×{len(own)}" if len(own) > 1 else ""
        cells = "".join(f"<td class=n>{html.escape(column.cell(own))}</td>" for column in columns)
        rows.append(f"<tr><td><code>{html.escape(name)}</code>{times}</td>{cells}</tr>")
    meanings = "".join(f"<br><b>{html.escape(word)}</b> {html.escape(meaning)}" for word, meaning in legend)
    return (
        f'<div style="overflow-x:auto"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'
        f"<p class=soft>{meanings.removeprefix('<br>')}</p>"
    )


def _amplification(modules: Sequence[Analysis]) -> str:
    """Table 7 of the paper for each group."""

    def column(head: str, pick: Any) -> Column:
        return Column(head, lambda own: number(mean(pick(module) for module in own)))

    columns = [
        column("‖ΔW‖", lambda module: module.norm),
        column("‖UᵀWV‖, U and V of ΔW", lambda module: module.base.projections.update),
        column("of W", lambda module: module.base.projections.strongest),
        column("random", lambda module: module.base.projections.random),
        column("amplification", lambda module: module.base.amplification),
    ]
    legend = [
        ("‖UᵀWV‖", "what W does between two spaces of as many dimensions as ΔW has rank"),
        ("of W", "W's own strongest directions. Is ‖UᵀWV‖ of ΔW far less, ΔW does not repeat what W stresses already"),
        ("random", "directions, in root mean square. Is ‖UᵀWV‖ of ΔW more, ΔW takes up what W has in it"),
        ("amplification", "‖ΔW‖ / ‖UᵀWV‖ with U and V of ΔW, the factor of Hu et al. 2021, section 7.3"),
    ]
    return _table(ordered(grouped(modules), change_of), columns, legend)


def _spectra(study: Study) -> str:
    """Bars of every matrix, group by group, the layers in their order."""
    drawn = {module.name for module in by_change(study.modules)[:_DRAWN]}
    groups = ordered(grouped(module for module in study.modules if module.name in drawn), change_of)
    parts = [_left_out(len(study.modules), "most changed")]
    for index, (name, own) in enumerate(groups.items()):
        ceiling = max((module.singular_values[0] for module in own if module.singular_values), default=1.0)
        figures = "".join(
            _figure(
                bars(module.singular_values, module.name, ceiling), f"{_numbers(module.name)}: {number(module.norm)}"
            )
            for module in sorted(own, key=lambda module: _numbers(module.name))
        )
        parts.append(
            f"<details{' open' if not index else ''}><summary><code>{html.escape(name)}</code>: σ from 0 to "
            f"{number(ceiling)}; below each, its number and ‖ΔW‖</summary>{_FIGURES.format(''.join(figures))}</details>"
        )
    return "".join(parts)


def _similarities(study: Study) -> str:
    alike = sorted(study.similarities, key=likeness, reverse=True)
    groups = ordered(grouped(alike), likeness)
    parts = [
        "<p>φ(i, j) is the share of the smaller of two spaces that lies in the larger: of the i strongest directions "
        "of this adapter, downwards, and the j strongest of the other, to the right (Hu et al. 2021, eq. 4).</p>",
        _table(groups, SIMILARITY_COLUMNS, SIMILARITY_LEGEND),
        _scale(),
    ]
    parts.append(_FIGURES.format("".join(_maps(name, own) for name, own in groups.items())))
    if len(groups) < len(alike):
        each = _FIGURES.format("".join(_maps(one.name, [one]) for one in alike[:_DRAWN]))
        note = _left_out(len(alike), "most alike")
        parts.append(f"<details><summary>each of the matrices</summary>{note}{each}</details>")
    return "".join(parts)


def _maps(name: str, own: Sequence[Similarity]) -> str:
    """The three heat maps of one matrix, or their means over several."""
    title = f"<code>{html.escape(name)}</code>{f', mean of {len(own)}' if len(own) > 1 else ''}"
    figures = "".join(_mean_map(own, field, caption) for field, caption in _MAPS)
    return f'<div style="min-width:17rem">{title}{_FIGURES.format(figures)}</div>'


def _mean_map(own: Sequence[Similarity], field: str, caption: str) -> str:
    """The mean of the φ's of one shape, which are nearly all: ΔW may be of lower rank than its factors."""
    maps = [getattr(similarity, field) for similarity in own]
    shapes = [(len(phi), len(phi[0]) if phi else 0) for phi in maps]
    commonest = max(shapes, key=shapes.count)
    same = [phi for phi, shape in zip(maps, shapes, strict=True) if shape == commonest]
    average = [[sum(cells) / len(same) for cells in zip(*rows, strict=True)] for rows in zip(*same, strict=True)]
    return _figure(heat_map(average, f"φ of {caption}, {own[0].name}"), caption)


def _figure(drawing: str, caption: str) -> str:
    style = "font-size:.75rem;min-width:4rem"
    return (
        f'<figure style="margin:0">{drawing}<figcaption class=soft style="{style}">{html.escape(caption)}</figcaption>'
        "</figure>"
    )


def _numbers(name: str) -> list[int]:
    """What tells a matrix from the others of its group."""
    return [int(digits) for digits in re.findall(r"(?<=[.\[])\d+(?=[.\]])", f".{name}")]


def _scale() -> str:
    """What the colours of the heat maps mean."""
    cells = "".join(
        f'<rect x="{18 + 8 * level}" width="8" height="12" fill-opacity="{level / _LEVELS:g}"/>'
        for level in range(_LEVELS + 1)
    )
    width = 18 + 8 * (_LEVELS + 1)
    return (
        f'<svg width="{width + 20}" height="14" role="img" aria-label="colours from 0 to 1"><text x="4" y="11">0</text>'
        f'<g fill="var(--a)">{cells}</g><rect x="18" y=".5" width="{width - 18}" height="12" fill="none" '
        f'stroke="var(--line)"/><text x="{width + 6}" y="11">1</text></svg>'
    )


def _left_out(count: int, which: str) -> str:
    if count <= _DRAWN:
        return ""
    return f"<p class=soft>The {_DRAWN} {which} of {count}; all of them are in analysis.json.</p>"
