"""compare.html: the tables of a comparison, a plot for each task, and how the learning rates were chosen."""

from __future__ import annotations

from typing import Any

from ...core.numbers import learning_rate, short_number
from ...core.table import Table
from ...training import html
from . import plots
from .results import Comparison, TaskFacts
from .table import UNFINISHED, about, facts, notes, rows_of, summary, summary_notes, task_table


def render(comparison: Comparison) -> str:
    """The page as HTML."""
    tasks = len(comparison.tasks)
    methods = len(dict.fromkeys(row.method for row in comparison.rows))
    return html.fill_template(
        "compare.html.j2",
        title=f"{methods} methods on {tasks} task{'s' if tasks != 1 else ''}",
        unfinished="" if comparison.finished else UNFINISHED,
        about=about(comparison),
        summary=summary(comparison) if tasks > 1 else None,
        summary_notes=summary_notes(comparison, "Bold"),
        tasks=[_task(comparison, task) for task in comparison.tasks],
    )


def _task(comparison: Comparison, task: TaskFacts) -> dict[str, Any]:
    points, colours = plots.points_of(comparison, task), plots.families(comparison)
    return {
        "name": task.name,
        "facts": facts(task),
        "plots": [plots.scatter(points, task.metrics[0], colours, width) for width in (plots.WIDE, plots.NARROW)]
        if points
        else [],
        "table": task_table(comparison, task),
        "notes": notes(comparison, task, "Bold"),
        "search": _search(comparison, task),
        "chosen_by": task.chosen_by,
    }


def _search(comparison: Comparison, task: TaskFacts) -> Table | None:
    """Each learning rate that was tried, and its score on the validation rows. None if none was tried."""
    rows = rows_of(comparison, task)
    rates = sorted({one for row in rows for one in row.tried})
    if not rates:
        return None
    lines = []
    for row in rows:
        cells = (
            "" if one not in row.tried else "diverged" if row.tried[one] is None else short_number(row.tried[one], 4)
            for one in rates
        )
        lines.append((row.method, *cells))
    chosen = {
        (index, rates.index(row.learning_rate) + 1) for index, row in enumerate(rows) if row.learning_rate in row.tried
    }
    return Table(("method", *map(learning_rate, rates)), tuple(lines), marked=frozenset(chosen))
