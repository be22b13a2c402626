"""compare.html: what a comparison found. Tables, a drawing for each task, and how the learning rates were chosen."""

from __future__ import annotations

import html
from collections.abc import Iterable

from ...core.numbers import learning_rate, number
from ...core.table import Table
from ...training.page import document
from . import plots
from .results import Comparison, TaskFacts
from .table import (
    UNFINISHED,
    about,
    facts,
    notes,
    rows_of,
    summary,
    summary_notes,
    table,
)

_STYLE = """
body { max-width: 76rem }
th.n, td.n { white-space: nowrap; text-align: right; padding: .35rem .4rem }
td.best { font-weight: 600 }
"""


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    tasks = len(comparison.tasks)
    methods = len(dict.fromkeys(row.method for row in comparison.rows))
    title = f"{methods} methods on {tasks} task{'s' if tasks != 1 else ''}"
    sections = [f"<h1>{title}</h1>"]
    if not comparison.finished:
        sections.append(f"<p><b>{UNFINISHED}</b></p>")
    sections.append(_soft(about(comparison)))
    if tasks > 1:
        sections += ["<h2>All tasks</h2>", _table(summary(comparison)), _soft(summary_notes(comparison, "Bold"))]
    families = plots.families(comparison)
    for task in comparison.tasks:
        sections += [
            f"<h2>{html.escape(task.name)}</h2>",
            _soft(facts(task)),
            plots.scatter(plots.points_of(comparison, task), task.metrics[0], families),
            _table(table(comparison, task)),
            _soft(notes(comparison, task, "Bold")),
            _search(comparison, task),
        ]
    return document(title, sections, plots.STYLE + _STYLE)


def _table(content: Table) -> str:
    head = "".join(
        f"<th{' class=n' if index else ''}>{html.escape(cell)}</th>" for index, cell in enumerate(content.head)
    )
    rows = []
    for index, row in enumerate(content.rows):
        cells = "".join(
            f'<td class="n{" best" if (index, column) in content.marked else ""}">{html.escape(cell)}</td>'
            for column, cell in enumerate(row[1:], 1)
        )
        rows.append(f"<tr><td>{html.escape(row[0])}</td>{cells}</tr>")
    return f'<div style="overflow-x:auto"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _search(comparison: Comparison, task: TaskFacts) -> str:
    """Each rate that was tried, and what it gave on the validation rows."""
    rows = rows_of(comparison, task)
    rates = sorted({one for row in rows for one in row.tried})
    if not rates:
        return ""
    lines = []
    for row in rows:
        cells = (
            "" if one not in row.tried else "diverged" if row.tried[one] is None else number(row.tried[one], 4)
            for one in rates
        )
        lines.append((row.method, *cells))
    chosen = {
        (index, rates.index(row.learning_rate) + 1) for index, row in enumerate(rows) if row.learning_rate in row.tried
    }
    content = Table(("method", *map(learning_rate, rates)), tuple(lines), marked=frozenset(chosen))
    return (
        f"<details><summary>the search of the learning rate: {html.escape(task.chosen_by)} on the validation rows"
        f"</summary>{_table(content)}</details>"
    )


def _soft(lines: Iterable[str]) -> str:
    return f"<p class=soft>{'<br>'.join(map(html.escape, lines))}</p>"
