"""analysis.html: the tables of `lorakit analyze`, ΔW's singular values as bars, φ as heat maps (figures 3 and 4)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from ...core.numbers import short_number
from ...core.table import Table
from ...training import html
from . import plots
from .measures import Analysis, Similarity
from .report import (
    SIMILARITY_COLUMNS,
    SIMILARITY_LEGEND,
    Column,
    Study,
    by_change,
    change_columns,
    change_legend,
    change_of,
    grouped,
    grouped_table,
    largest_first,
    likeness,
    mean,
    meaning,
)

_DRAWN = 240  # matrices with their own plot: the most changed or most similar ones
_MAPS = (("A", "A"), ("right", "ΔW, input"), ("left", "ΔW, output"))  # of a `Similarity`: field, caption

Figures = list[tuple[Markup, str]]  # each a drawing and what stands below it


@dataclass(frozen=True)
class Measured:
    """A table, and the meaning of its columns."""

    table: Table
    legend: Sequence[tuple[str, str]]


def render(study: Study) -> str:
    """The page as HTML."""
    modules = by_change(study.modules)
    groups = largest_first(grouped(modules), change_of)
    base = f"base weights: {study.base}" if study.base else "without base weights"
    return html.fill_template(
        "analysis.html.j2",
        title=f"What {study.adapter} did",
        facts=f"{len(modules)} matrices; {base}",
        study=study,
        meaning=meaning(study),
        most=_DRAWN,
        changes=Measured(grouped_table(groups, change_columns(study)), change_legend(study)),
        amplification=None if study.base is None else _amplification(groups),
        spectra=_spectra(study.modules, {module.name for module in modules[:_DRAWN]}),
        **_similarities(study.similarities),
    )


def _amplification(groups: dict[str, list[Analysis]]) -> Measured:
    """Table 7 of the paper for each group."""

    def column(head: str, pick: Any) -> Column:
        return Column(head, lambda own: short_number(mean(pick(module) for module in own)))

    columns = [
        column("‖ΔW‖", lambda module: module.norm),
        column("‖UᵀWV‖, U and V of ΔW", lambda module: module.base.projections.update),
        column("of W", lambda module: module.base.projections.strongest),
        column("random", lambda module: module.base.projections.random),
        column("amplification", lambda module: module.base.amplification),
    ]
    legend = [
        ("‖UᵀWV‖", "what W does between two spaces of as many dimensions as ΔW has rank"),
        ("of W", "W's own strongest directions. If ‖UᵀWV‖ of ΔW is much smaller, ΔW does not repeat what W stresses"),
        ("random", "random directions, root mean square. If ‖UᵀWV‖ of ΔW is larger, ΔW takes up what W has in it"),
        ("amplification", "‖ΔW‖ / ‖UᵀWV‖ with U and V of ΔW, the factor of Hu et al. 2021, section 7.3"),
    ]
    return Measured(grouped_table(groups, columns), legend)


def _spectra(modules: Iterable[Analysis], drawn: set[str]) -> list[tuple[str, str, Figures]]:
    """For each group: its name, the value at the top of its plots, and the bars of its matrices in layer order."""
    found = []
    for name, own in largest_first(grouped(module for module in modules if module.name in drawn), change_of).items():
        ceiling = max((module.singular_values[0] for module in own if module.singular_values), default=1.0)
        figures = [
            (plots.bars(module.singular_values, module.name, ceiling), f"{numbers}: {short_number(module.norm)}")
            for numbers, module in sorted(((_numbers(module.name), module) for module in own), key=lambda one: one[0])
        ]
        found.append((name, short_number(ceiling), figures))
    return found


def _similarities(found: Sequence[Similarity]) -> dict[str, Any]:
    """What the page shows for two adapters; for one adapter there is nothing."""
    if not found:
        return {"similarities": None}
    alike = sorted(found, key=likeness, reverse=True)
    groups = largest_first(grouped(alike), likeness)
    return {
        "similarities": Measured(grouped_table(groups, SIMILARITY_COLUMNS), SIMILARITY_LEGEND),
        "scale": plots.scale(),
        "groups": [(name, len(own), _maps(own)) for name, own in groups.items()],
        "each": [(one.name, 1, _maps([one])) for one in alike[:_DRAWN]] if len(groups) < len(alike) else None,
    }


def _maps(own: Sequence[Similarity]) -> Figures:
    """The three heat maps of one matrix, or their means over several."""
    return [
        (plots.heat_map(_mean([getattr(one, field) for one in own]), f"φ of {caption}, {own[0].name}"), caption)
        for field, caption in _MAPS
    ]


def _mean(maps: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The mean of the φ's of the commonest shape. A few may be smaller: ΔW can have a lower rank than A and B."""
    shapes = [(len(phi), len(phi[0]) if phi else 0) for phi in maps]
    commonest = max(shapes, key=shapes.count)
    same = [phi for phi, shape in zip(maps, shapes, strict=True) if shape == commonest]
    return [[sum(cells) / len(same) for cells in zip(*rows, strict=True)] for rows in zip(*same, strict=True)]


def _numbers(name: str) -> list[int]:
    """The numbers in a matrix's name, which distinguish it from the others of its group."""
    return [int(digits) for digits in re.findall(r"(?<=[.\[])\d+(?=[.\]])", f".{name}")]
