"""A comparison as tables: for the terminal, as Markdown, and as JSON for a program.

Each task has a table with a line for each method. With several tasks there is also a table of their first metrics. The
contents (`Table`, `facts`, `notes`) are made once; `tables_text`, `markdown` and `page.py` only lay them out.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence

from ...core.numbers import NONE, duration, learning_rate, rounded, size
from ...core.table import Table, escaped, folded
from ...training.report import heading
from ...training.scores import METRICS
from ...training.terminal import columns
from .results import Comparison, Interval, MethodRow, TaskFacts

UNFINISHED = "Unfinished: some runs are still to be made."

_WIDTH = 120  # characters of a line, or those of a narrower terminal
_NAME = 40  # columns for a method's name; a longer name continues in the next line


def tables_text(comparison: Comparison) -> str:
    """The tables in lines of 120 characters, or of a narrower terminal; a wider table continues below."""
    width = _width()
    lines = [] if comparison.finished else [UNFINISHED]
    lines += _wrapped(about(comparison))
    if len(comparison.tasks) > 1:
        lines += [
            heading("all tasks"),
            *summary(comparison).lines(width, _NAME),
            "",
            *_wrapped(summary_notes(comparison, "*")),
        ]
    for task in comparison.tasks:
        lines += [
            heading(task.name),
            *_wrapped(facts(task)),
            "",
            *task_table(comparison, task).lines(width, _NAME),
            "",
        ]
        lines += _wrapped(notes(comparison, task, "*"))
    return "\n".join(lines)


def markdown(comparison: Comparison) -> str:
    """The tables as Markdown, with headings of the second level and GitHub's tables."""
    parts = [] if comparison.finished else [f"**{UNFINISHED}**"]
    parts += map(escaped, about(comparison))
    if len(comparison.tasks) > 1:
        parts += ["## All tasks", summary(comparison).markdown(), _listed(summary_notes(comparison, "Bold"))]
    for task in comparison.tasks:
        parts += [f"## {escaped(task.name)}", *map(escaped, facts(task)), task_table(comparison, task).markdown()]
        parts.append(_listed(notes(comparison, task, "Bold")))
    return "\n\n".join(parts) + "\n"


def as_json(comparison: Comparison) -> str:
    """Everything as JSON, with numbers to six digits. A number that does not exist is null."""
    plain = dataclasses.asdict(comparison)
    plain["left_out"] = [dict(zip(("task", "method", "reason"), one, strict=True)) for one in comparison.left_out]
    return json.dumps(rounded(plain), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def about(comparison: Comparison) -> list[str]:
    """Lines on what is common to all tasks: the model, the seeds and the machine."""
    seeds = f"seed{'s' if len(comparison.seeds) > 1 else ''} {', '.join(map(str, comparison.seeds))}"
    machine = "; ".join(f"{name}: {value}" for name, value in comparison.machine.items())
    return [f"Model: {comparison.model}; {seeds}.", *([f"Machine: {machine}."] if machine else [])]


def facts(task: TaskFacts) -> list[str]:
    """Lines on what the scores of a task come from: its data and its training."""
    rows = ", ".join(f"{count:,} {name}" for name, count in task.rows.items())
    training = ", ".join(
        f"{name.replace('_', ' ')} {f'{value:g}' if isinstance(value, float) else value}"
        for name, value in task.training.items()
    )
    return [f"{task.kind}; data: {task.source}; rows: {rows}.", *([f"Training: {training}."] if training else [])]


def task_table(comparison: Comparison, task: TaskFacts) -> Table:
    """A line for each method, then one for each published number."""
    rows = rows_of(comparison, task)
    published = [
        (f"{name} (published)", values)
        for name, values in task.published.items()
        if any(metric in values for metric in task.metrics)
    ]
    columns: list[list[str]] = [[*(row.method for row in rows), *(name for name, _ in published)]]
    for metric in task.metrics:
        measured = [row.scores.get(metric) for row in rows]
        digits = _decimals(measured)
        columns.append([score(interval, digits) for interval in measured])
        columns[-1] += [
            # Rounded to the column's decimals, without adding any to the published number.
            NONE if metric not in values else str(round(values[metric], digits))
            for _, values in published
        ]
    ours: dict[str, Callable[[MethodRow], str]] = {
        "rate": lambda row: learning_rate(row.learning_rate),
        "train time": lambda row: duration(row.seconds),
        "peak memory": lambda row: size(row.peak_bytes),
        "file": lambda row: size(row.file_bytes),
        "latency": latency,
    }
    columns.insert(1, [f"{row.parameters:,}" for row in rows] + [NONE] * len(published))
    columns += [[*map(cell, rows), *[NONE] * len(published)] for cell in ours.values()]
    first = task.metrics[0]
    best = _best(first, [_mean(row.scores.get(first)) for row in rows])
    return Table(
        ("method", "trainable", *map(_with_direction, task.metrics), *ours),
        tuple(zip(*columns, strict=True)),
        marked=frozenset((row, 2) for row in best),
    )


def summary(comparison: Comparison) -> Table:
    """The first metric of every task, and its mean over the tasks for methods that have it in all of them.

    There is no mean if some of the metrics are better when higher and others when lower.
    """
    methods = list(dict.fromkeys(row.method for row in comparison.rows))
    scores = {
        (row.method, task.name): row.scores.get(task.metrics[0])
        for task in comparison.tasks
        for row in rows_of(comparison, task)
    }
    head, columns, best = ["method"], [methods], set()
    means: list[list[float | None]] = []
    for index, task in enumerate(comparison.tasks, 1):
        own = [scores.get((name, task.name)) for name in methods]
        means.append([_mean(interval) for interval in own])
        head.append(f"{task.name}, {_with_direction(task.metrics[0])}")
        columns.append([score(interval, _decimals(own)) for interval in own])
        best |= {(row, index) for row in _best(task.metrics[0], means[-1])}
    if len({higher_is_better(task.metrics[0]) for task in comparison.tasks}) == 1:
        over: list[float | None] = []
        for values in zip(*means, strict=True):
            known = [value for value in values if value is not None]
            over.append(sum(known) / len(known) if len(known) == len(values) else None)
        intervals = [None if value is None else Interval(value, None, (value,)) for value in over]
        head.append("mean")
        columns.append([score(interval, _decimals(intervals)) for interval in intervals])
        best |= {(row, len(means) + 1) for row in _best(comparison.tasks[0].metrics[0], over)}
    return Table(tuple(head), tuple(zip(*columns, strict=True)), marked=frozenset(best))


def summary_notes(comparison: Comparison, mark: str) -> list[str]:
    """Notes below the table of all tasks. mark: how the best is marked there."""
    return [f"{mark} is the best of a column. {_interval(comparison)}"]


def notes(comparison: Comparison, task: TaskFacts, mark: str) -> list[str]:
    """Notes below a task's table. mark: how the best is marked there."""
    rows = rows_of(comparison, task)
    lines = [f"{mark} is the best {task.metrics[0]}. {_interval(comparison)} {_choice(comparison, task)}"]
    lines.append("Train time is the shortest of the seeds'.")
    lines += _memory(comparison, rows)
    lines.append("Latency is that of a forward pass as the method serves, × the model's own.")
    if any(row.latency_ends for row in rows):
        lines[-1] = (
            "Latency is that of a forward pass as the method serves, × the model's own: the median of turns in which "
            "both run, and in brackets its 95 % interval, which holds those of all seeds. ×1: the interval holds "
            "1, so no difference was found."
        )
    head = max((row.head for row in rows), default=0)
    if head:
        lines.append(f"The new head has {head:,} parameters, which every method trains besides.")
    for row in rows:
        if row.seeds < len(comparison.seeds):
            lines.append(f"{row.method}: {row.seeds} of {len(comparison.seeds)} seeds so far.")
        if row.diverged:
            lines.append(f"{row.method}: {row.diverged} of {row.seeds} seeds diverged.")
    lines += [
        f"{name} does not apply: {reason.rstrip('.')}."
        for where, name, reason in comparison.left_out
        if where == task.name
    ]
    if task.published:
        lines.append("Published numbers are their authors', not measured here.")
    return lines


def rows_of(comparison: Comparison, task: TaskFacts) -> list[MethodRow]:
    return [row for row in comparison.rows if row.task == task.name]


def score(interval: Interval | None, digits: int) -> str:
    """mean ± half, each with `digits` decimals; mean (low to high) if the score's bounds cut the interval."""
    if interval is None or not math.isfinite(interval.mean):
        return NONE
    if interval.is_cut and interval.ends is not None:
        return f"{interval.mean:.{digits}f} ({interval.ends[0]:.{digits}f} to {interval.ends[1]:.{digits}f})"
    half = "" if interval.half is None else f" ± {interval.half:.{digits}f}"
    return f"{interval.mean:.{digits}f}{half}"


def latency(row: MethodRow) -> str:
    """×ratio (low to high), ×1 (low to high) if the interval holds 1, or ×ratio without an interval."""
    if not math.isfinite(row.latency):
        return NONE
    if row.latency_ends is None:
        return f"×{row.latency:.2f}"
    low, high = (round(end, 2) for end in row.latency_ends)
    return f"×{'1' if low <= 1 <= high else f'{row.latency:.2f}'} ({low:.2f} to {high:.2f})"


def higher_is_better(metric: str) -> bool:
    """Whether a higher value of the metric is better; True for a metric that lorakit does not know."""
    return metric not in METRICS or METRICS[metric].higher_is_better


def _interval(comparison: Comparison) -> str:
    count = len(comparison.seeds)
    if count < 3:
        return f"From {'a single seed' if count == 1 else 'two seeds'} there is no interval."
    cut = any(interval.is_cut for row in comparison.rows for interval in row.scores.values())
    ends = " In brackets are its ends where it would pass the score's own." if cut else ""
    return f"± is the 95 % interval of the mean over {count} seeds (Student's t).{ends}"


def _choice(comparison: Comparison, task: TaskFacts) -> str:
    """A sentence on where the learning rates come from."""
    rows, trials = rows_of(comparison, task), comparison.trials
    given = [row.method for row in rows if not row.tried]
    if len(given) == len(rows):
        return "The learning rate is given."
    best = f"the best of at most {trials} by {task.chosen_by} on the validation rows"
    beside = f"; that of {', '.join(given)} is given" if given else ""
    return f"The learning rate is {best if trials > 1 else 'the usual one of each method'}{beside}."


def _memory(comparison: Comparison, rows: Sequence[MethodRow]) -> list[str]:
    """A sentence on whose memory the peak is. On a GPU it is that of the run's tensors in any case."""
    passes = [row for row in rows if row.together > 1]
    said = []
    if passes:
        whose = "" if len(passes) == len(rows) else f" of {', '.join(row.method for row in passes)}"
        most = max(row.together for row in passes)
        said = [
            f"Train time{whose} is that of a pass over up to {most} runs, divided by their number, and peak memory is "
            "that of the pass."
        ]
    rows = [row for row in rows if row.together == 1]
    shared = [row.method for row in rows if not row.alone]
    if "gpu" in comparison.machine or not rows:
        return said
    if not shared:
        return [*said, "Peak memory is that of a process which makes a single run."]
    whose = "" if len(shared) == len(rows) and not said else f" of {', '.join(shared)}"
    return [
        *said,
        f"Peak memory{whose} is that of a process which made several runs, and may hold what earlier ones left.",
    ]


def _with_direction(metric: str) -> str:
    return metric if higher_is_better(metric) else f"{metric} ↓"


def _mean(interval: Interval | None) -> float | None:
    return interval.mean if interval is not None and math.isfinite(interval.mean) else None


def _best(metric: str, means: Sequence[float | None]) -> set[int]:
    """The indices of the best mean; several if they are equal, and none if all are equal: then nothing is best."""
    known = [mean for mean in means if mean is not None]
    if len(known) > 1 and len(set(known)) == 1:
        return set()
    best = (max if higher_is_better(metric) else min)(known, default=None)
    return {index for index, mean in enumerate(means) if mean is not None and mean == best}


def _decimals(column: Iterable[Interval | None]) -> int:
    """The decimals of a column: 3 up to 1, 2 below 10, otherwise 1; one more if an interval is narrow."""
    known = [interval for interval in column if interval is not None and math.isfinite(interval.mean)]
    largest = max((abs(interval.mean) for interval in known), default=0.0)
    digits = 3 if largest <= 1 else 2 if largest < 10 else 1
    return digits + any(interval.half is not None and 0 < interval.half < 10**-digits for interval in known)


def _wrapped(lines: Iterable[str]) -> list[str]:
    return [part for line in lines for part in folded(line, _width())]


def _width() -> int:
    return min(_WIDTH, columns(_WIDTH))


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {escaped(line)}" for line in lines)
