"""The output of `lorakit analyze`: a table for a person, everything as JSON for a program.

A model has the same few matrices in each of its layers. The table therefore has one line, with means, for the matrices
whose names differ only in their numbers. Below it, the most changed matrices have their own lines.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ...core.numbers import NONE, percent, rounded, short_number
from ...core.report import numberless
from ...core.table import Table, folded
from ...training.report import heading
from .measures import THRESHOLD, TOP, AgainstBase, Analysis, Similarity

_MOST = 5  # lines of the most changed
_WIDTH = 80  # columns of a terminal, for sentences

Item = TypeVar("Item", bound=Analysis | Similarity)


@dataclass(frozen=True)
class Study:
    """Everything that one run of `lorakit analyze` found, matrices in the adapter's order."""

    adapter: str
    base: str | None  # None: without base weights
    modules: tuple[Analysis, ...]
    other: str | None = None
    similarities: tuple[Similarity, ...] = ()
    notes: tuple[str, ...] = ()  # what was left out, and why


@dataclass(frozen=True)
class Column:
    """A column of a table: its head, and the function from a line's matrices to the cell's text."""

    head: str
    cell: Callable[[Sequence[Any]], str]


def tables_text(study: Study, every: bool = False) -> str:
    """The tables as text. every: print a line for each matrix."""
    count = len(study.modules)
    matrices = f"{count} {'matrix' if count == 1 else 'matrices'}"
    lines = [heading(f"{study.adapter}: {matrices}").lstrip("\n")]
    lines += [f"base weights: {study.base}"] if study.base else []
    lines += _sections(by_change(study.modules), change_columns(study), every, "most changed, each by itself")
    lines += ["", *(f"  {head:<10} {meaning}" for head, meaning in change_legend(study))]
    if study.similarities:
        lines.append(heading(f"φ with {study.other}: 1 the same directions, 0 orthogonal ones"))
        alike = sorted(study.similarities, key=likeness, reverse=True)
        lines += _sections(alike, SIMILARITY_COLUMNS, every, "most alike, each by itself")
        lines += ["", *(f"  {head:<10} {meaning}" for head, meaning in SIMILARITY_LEGEND)]
    lines += ["", *(part for line in meaning(study) for part in folded(line, _WIDTH))]
    lines += [line for note in study.notes for line in ("", f"note: {note}")]
    return "\n".join(lines)


def meaning(study: Study) -> list[str]:
    """Sentences that say what the numbers mean for this adapter."""
    modules = study.modules
    groups = largest_first(grouped(modules), change_of)
    known = [module for module in modules if module.base is not None and module.base.change is not None]
    lines = []
    if known and len(known) == len(modules):
        most = next(iter(groups))
        lines.append(
            f"The adapter moved the weights by {percent(mean(map(change_of, modules)))} of their size on average, and "
            f"{most} most, by {percent(mean(map(change_of, groups[most])))}."
        )
    rank, needed = mean(len(m.singular_values) for m in modules), mean(m.directions_90 for m in modules)
    if rank and needed:
        enough = needed <= rank / 2
        lines.append(
            f"90 % of ΔW lies in {needed:.1f} of its {rank:.1f} directions: "
            + (
                f"a rank near {max(module.directions_90 for module in modules)} would hold most of it."
                if enough
                else "it uses its rank, and a lower one would lose a part of it."
            )
        )
    bases = [module.base for module in modules if module.base is not None]
    if bases:
        new, looked_at = sum(base.intruders for base in bases), sum(len(base.cosines) for base in bases)
        lines.append(
            f"{new} of the {looked_at} strongest directions of the changed weights are new"
            + (", with none like them in W: there the update has the upper hand." if new else ": W had them all.")
        )
    if study.similarities:
        alike, chance = mean(map(likeness, study.similarities)), mean(s.chance[1] for s in study.similarities)
        lines.append(
            f"The output directions of {study.other} and of this adapter overlap by φ = {short_number(alike)}, where "
            f"1 is the same and {short_number(chance)} is chance."
        )
    return lines


def as_json(study: Study) -> str:
    """Everything as JSON, with numbers to six digits. A number that does not exist is null."""
    plain = dataclasses.asdict(study)
    for module, analysis in zip(plain["modules"], study.modules, strict=True):
        if analysis.base is not None:
            module["base"]["intruders"] = analysis.base.intruders
    for alike, similarity in zip(plain["similarities"], study.similarities, strict=True):
        alike["chance"] = dict(zip(("right", "left"), similarity.chance, strict=True))
    return json.dumps(rounded(plain), ensure_ascii=False, allow_nan=False) + "\n"


def grouped(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Items by group, under a name with stars: names differ only in their numbers; shapes and ranks are equal."""
    groups: dict[tuple[str, str], list[Item]] = {}
    for item in items:
        name = re.sub(r"\[\d+\]", "[*]", numberless(item.name))
        ranks = str(item.rank) if isinstance(item, Analysis) else "{}, {}".format(*item.ranks)
        groups.setdefault((name, "{} × {}, rank {}".format(*item.shape, ranks)), []).append(item)
    names = [name for name, _ in groups]
    return {
        own[0].name if len(own) == 1 else name if names.count(name) == 1 else f"{name} ({size})": own
        for (name, size), own in groups.items()
    }


def by_change(modules: Iterable[Analysis]) -> list[Analysis]:
    """The modules, most changed first."""
    return sorted(modules, key=change_of, reverse=True)


def change_of(module: Analysis) -> float:
    """How far a module has moved: relative to its weight if that is known, otherwise ‖ΔW‖."""
    return module.norm if module.base is None else module.base.change or 0.0


def largest_first(groups: dict[str, list[Item]], key: Callable[[Item], float]) -> dict[str, list[Item]]:
    """The groups by the mean of `key`, largest first."""
    return dict(sorted(groups.items(), key=lambda group: sum(map(key, group[1])) / len(group[1]), reverse=True))


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of the values that are not None; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def grouped_table(groups: Mapping[str, Sequence[Item]], columns: Sequence[Column]) -> Table:
    """A table with a line for each group, and the number of its matrices if it has several."""
    rows = (
        (name, f"×{len(own)}" if len(own) > 1 else "", *(column.cell(own) for column in columns))
        for name, own in groups.items()
    )
    return Table(("", "", *(column.head for column in columns)), tuple(rows))


def change_columns(study: Study) -> list[Column]:
    """The columns of the table of changes, with or without base weights."""

    def base(modules: Sequence[Analysis], pick: Callable[[AgainstBase], float | None]) -> float | None:
        return mean(pick(module.base) for module in modules if module.base is not None)

    def within(modules: Sequence[Analysis]) -> str:
        pairs = [_within_rank(module) for module in modules]
        left, right = (mean(pair[side] for pair in pairs if pair is not None) for side in (0, 1))
        return NONE if left is None or right is None else f"{left:.1%} {right:.1%}"

    def intruders(modules: Sequence[Analysis]) -> str:
        bases = [module.base for module in modules if module.base is not None]
        return f"{sum(b.intruders for b in bases)}/{sum(len(b.cosines) for b in bases)}"

    columns = [
        Column("rank", lambda modules: str(modules[0].rank)),
        Column("eff.", lambda modules: f"{mean(m.effective_rank for m in modules):.1f}"),
        Column("90%", lambda modules: f"{mean(m.directions_90 for m in modules):.1f}"),
        Column("‖ΔW‖", lambda modules: short_number(mean(m.norm for m in modules))),
    ]
    if study.base is None:
        columns.insert(3, Column("99%", lambda modules: f"{mean(m.directions_99 for m in modules):.1f}"))
        columns.append(
            Column("σ₁", lambda modules: short_number(mean(max(m.singular_values, default=0.0) for m in modules)))
        )
        return columns
    return [
        *columns,
        Column("/‖W‖", lambda modules: percent(base(modules, lambda b: b.change))),
        Column("amplified", lambda modules: short_number(base(modules, lambda b: b.amplification))),
        Column("in top r", within),
        Column("intruders", intruders),
    ]


def change_legend(study: Study) -> list[tuple[str, str]]:
    """The meaning of the columns of changes."""
    legend = [
        ("eff.", "effective rank of ΔW: exp of the entropy of its shares of energy, σ²/Σσ²"),
        ("90%", "how many directions hold 90 % of the energy"),
    ]
    if study.base is None:
        return [*legend, ("σ₁", "the largest singular value of ΔW")]
    return [
        *legend,
        ("/‖W‖", "‖W' − W‖ / ‖W‖: how far the weight has moved"),
        ("amplified", "‖ΔW‖ / ‖UᵀWV‖: how many times more than W itself does in ΔW's directions"),
        ("in top r", "ΔW's energy in W's r strongest output, input directions; by chance r/out, r/in"),
        ("intruders", f"of W's {TOP} strongest directions, after: those with no |cosine| ≥ {THRESHOLD} to one before"),
    ]


def likeness(similarity: Similarity) -> float:
    """φ(r₁, r₂) of the output directions. B starts at zero, so this similarity was learnt."""
    return _last(similarity.left) or 0.0


def _first(phi: Sequence[Sequence[float]]) -> float | None:
    return phi[0][0] if phi and phi[0] else None


def _last(phi: Sequence[Sequence[float]]) -> float | None:
    return phi[-1][-1] if phi and phi[0] else None


def _first_and_last(pick: Callable[[Similarity], Any]) -> Callable[[Sequence[Similarity]], str]:
    def cell(own: Sequence[Similarity]) -> str:
        pair = mean(_first(pick(s)) for s in own), mean(_last(pick(s)) for s in own)
        return " ".join(NONE if value is None else f"{value:.3f}" for value in pair)

    return cell


SIMILARITY_COLUMNS = [
    Column("ranks", lambda own: "{}, {}".format(*own[0].ranks)),
    Column("A", _first_and_last(lambda similarity: similarity.A)),
    Column("input", _first_and_last(lambda similarity: similarity.right)),
    Column("output", _first_and_last(lambda similarity: similarity.left)),
    Column("by chance", lambda own: "{:.3f} {:.3f}".format(*own[0].chance)),
]
SIMILARITY_LEGEND = [
    ("A", "φ(1, 1) and φ(r₁, r₂), the strongest directions and all, of A, as in the paper"),
    ("input", "the same of ΔW's directions on the side of the input"),
    ("output", "and on the side of the output"),
    ("by chance", "φ(r₁, r₂) of random spaces, input and output: max(r₁, r₂)/d"),
]


def _within_rank(module: Analysis) -> tuple[float, float] | None:
    """The share of ΔW's energy within W's r strongest output and input directions, with r the rank of ΔW."""
    return None if module.base is None else module.base.energy_within.get(len(module.singular_values))


def _sections(items: Sequence[Item], columns: Sequence[Column], every: bool, title: str) -> list[str]:
    """A line for each group and the first few items, or a line for each item."""
    groups = grouped(items)
    if every or len(groups) == len(items):
        return _lines({item.name: [item] for item in items}, columns)
    key: Any = change_of if isinstance(items[0], Analysis) else likeness
    few = {item.name: [item] for item in items[:_MOST]}
    return [*_lines(largest_first(groups, key), columns), "", f"{title}:", *_lines(few, columns)]


def _lines(groups: dict[str, list[Item]], columns: Sequence[Column]) -> list[str]:
    """A line for each group. The common beginning of all names is in the head, so that lines fit a terminal."""
    prefix = _common_prefix(list(groups))
    found = grouped_table(groups, columns)
    rows = tuple((name.removeprefix(prefix), *cells) for name, *cells in found.rows)
    return replace(found, head=(f"{prefix}…" if prefix else "module", *found.head[1:]), rows=rows).lines()


def _common_prefix(names: Sequence[str]) -> str:
    """The dotted parts that all names begin with; none for a single name."""
    if len(names) < 2:
        return ""
    depth = 0
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        depth += 1
    return "".join(f"{part}." for part in names[0].split(".")[:depth])
