"""The texts of a run: headings, the comparison it ends with, and the commands to use next.

The functions only return text; the caller prints it.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from ..core.table import Table
from .intervals import Ends
from .terminal import columns, to_width, without_commands

_WIDTH = 80  # of a heading, and of answers where no terminal says another width
_ITEM = re.compile(r'"(?:[^"\\]|\\.)*"?|: (?![{\[])')  # in JSON: a text, perhaps cut, or what joins it to its key
_HELD = "\ue000"  # a space at which no line ends; the character is for private use


@dataclass(frozen=True)
class Sample:
    """One held-out row: what was asked, what the base model and the adapted one answer, what was expected."""

    prompt: str
    base: str
    adapter: str
    expected: str


@dataclass(frozen=True)
class Evaluation:
    """Base and adapted model on the held-out rows. Metrics by name: (base, adapter); rates in [0, 1].

    right: whether the adapted model's answer to each sample is the expected one; empty for numbers, which are never
    equal. intervals: the 95 % intervals of the metrics over the rows, by name: (base, adapter).
    """

    rows: int
    split: str
    metrics: dict[str, tuple[float, float]]
    samples: tuple[Sample, ...]
    right: tuple[bool, ...] = ()
    notes: tuple[str, ...] = ()  # what a reader of the metrics must know
    intervals: Mapping[str, tuple[Ends, Ends]] = field(default_factory=dict)


@dataclass(frozen=True)
class SeveralEvaluations:
    """by_adapter: base and adapted model on all rows with each adapter; or, where rows name their adapter, on its rows
    ("none": those of the base model). all: then, on all of them.
    """

    by_adapter: dict[str, Evaluation]
    all: Evaluation | None

    @property
    def alone(self) -> Evaluation | None:
        """The only evaluation that there is, if one adapter, or the base alone, was scored on all rows."""
        return next(iter(self.by_adapter.values())) if self.all is None and len(self.by_adapter) == 1 else None


def heading(title: str, printed: bool = True) -> str:
    """A line of 80 characters. printed: or of fewer, if the terminal has fewer."""
    width = min(_WIDTH, columns(_WIDTH)) if printed else _WIDTH
    return f"\n── {title} " + "─" * max(4, width - 4 - len(title))


def marked(pieces: Sequence[tuple[str, bool]], colour: bool) -> str:
    """An example with the tokens that bear loss marked: in green on a terminal, between ⟦ ⟧ elsewhere."""
    opening, closing = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    text, inside = "", False
    for piece, bears_loss in pieces:
        if bears_loss != inside:
            text += opening if bears_loss else closing
            inside = bears_loss
        text += piece
    return text + (closing if inside else "")


def comparison(result: Evaluation, shown: int = 3, *, rows: str = "", adapted: bool = True) -> str:
    """The metrics before and after, and a few answers side by side. adapted=False: only those of the model.

    rows: what was scored, if not held-out rows.
    """
    scored = f"{result.rows} {rows or f'held-out rows ({result.split})'}"
    lines = [heading(f"{scored}: base → adapter" if adapted else scored)]
    for name, (before, after) in result.metrics.items():
        gained = f" → {metric_value(name, after)}" if adapted else ""
        ends = interval(result, name)
        within = f"   95 % interval {ends[adapted]}" if ends else ""
        lines.append(to_width(f"{name:<16} {metric_value(name, before):>9}{gained}{within}"))
    lines += [to_width(f"note: {note}") for note in result.notes]
    for sample in telling(result.samples)[:shown]:
        lines += ["", *_beside("  ", sample.prompt)]
        lines += _beside("    base      ", sample.base) if adapted else []
        lines += _beside(f"    {'adapter' if adapted else 'answer':<9} ", sample.adapter)
        lines += _beside("    expected  ", sample.expected)
    return "\n".join(lines)


def comparison_of_several(result: SeveralEvaluations, shown: int = 3, *, rows: str = "") -> str:
    """A table with a line for each adapter, and a few answers side by side. rows: what was scored."""
    lines, whole = result.by_adapter, result.all
    evaluations = {**lines, **({} if whole is None else {"all rows": whole})}
    metrics = list(dict.fromkeys(metric for own in evaluations.values() for metric in own.metrics))
    first = next(iter(evaluations.values())) if whole is None else whole
    text = [heading(f"{first.rows} {rows}: base → adapter")]
    for metric in metrics:
        scores = {name: (own.rows, own.metrics[metric]) for name, own in evaluations.items() if metric in own.metrics}
        cells = (
            (name, str(count), metric_value(metric, base), metric_value(metric, adapted))
            for name, (count, (base, adapted)) in scores.items()
        )
        text += Table((metric, "rows", "base", "adapter"), tuple(cells)).lines()
    text += [
        to_width(f"note: {note}") for note in dict.fromkeys(note for own in evaluations.values() for note in own.notes)
    ]
    answers = list(_side_by_side(lines) if whole is None else _by_their_own(lines))
    for asked, said, _ in sorted(answers, key=lambda answer: not answer[2])[:shown]:
        width = max(map(len, said))
        text += ["", *_beside("  ", asked)]
        text += [line for name, own in said.items() for line in _beside(f"    {name:<{width}}  ", own)]
    return "\n".join(text)


def _side_by_side(lines: Mapping[str, Evaluation]) -> Iterator[tuple[str, dict[str, str], bool]]:
    """Of each row: what was asked, what everyone answers, whether an adapter differs from the base."""
    for samples in zip(*(own.samples for own in lines.values()), strict=True):
        base, expected = samples[0].base, samples[0].expected
        said = {name: sample.adapter for name, sample in zip(lines, samples, strict=True)}
        differ = any(sample.base.strip() != sample.adapter.strip() for sample in samples)
        yield samples[0].prompt, {"base": base, **said, "expected": expected}, differ


def _by_their_own(lines: Mapping[str, Evaluation]) -> Iterator[tuple[str, dict[str, str], bool]]:
    """The same where each row has an adapter; one of each adapter first."""
    for samples in zip_longest(*(telling(own.samples) for own in lines.values())):
        for name, sample in zip(lines, samples, strict=True):
            if sample is not None:
                differ = sample.base.strip() != sample.adapter.strip()
                yield sample.prompt, {"base": sample.base, name: sample.adapter, "expected": sample.expected}, differ


def _beside(label: str, text: str) -> list[str]:
    """The text beside its label, broken at the width of the terminal, so that lines stay under it.

    A text is broken between words, and JSON after a comma. What would command the terminal is shown as �.
    """
    line = without_commands(one_line(text, 220))
    if is_json := line.startswith(("{", "[")):
        line = _ITEM.sub(lambda item: item[0].replace(" ", _HELD), line)
    found = textwrap.wrap(
        line,
        max(40, columns(_WIDTH)),
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_on_hyphens=False,
    )
    return [own.replace(_HELD, " ") if is_json else own for own in found] or [label.rstrip()]


def next_commands(
    folder: Path, *, answers: bool, prompt: str = "TEXT", pair: str | None = None, merge: bool = True
) -> str:
    """The commands that people usually run next, to copy.

    answers: whether the model writes text (a classifier does not). prompt, pair: what to ask, or to classify.
    merge: whether there is an adapter to merge.
    """
    lorakit, model = program_name(), flag_text("--model", str(folder))
    asked = flag_text("--prompt", prompt) + (f" {flag_text('--pair', pair)}" if pair else "")
    lines = [f"  {lorakit} generate {model} {asked}"]
    if answers:
        lines.append(f"  {lorakit} chat {model}")
    if merge:
        lines.append(f"  {lorakit} merge {model} {flag_text('--output-dir', str(_free(folder)))}")
    return "\n".join([heading("next"), *lines])


def flag_text(name: str, value: str) -> str:
    """A flag and its value, quoted for a shell."""
    return shlex.quote(f"{name}={value}") if value.startswith("-") else f"{name} {shlex.quote(value)}"


def _free(folder: Path) -> Path:
    """A path beside `folder` for the merged model, at which nothing exists yet."""
    beside = folder.resolve() if folder.name in ("", "..") else folder
    names = (beside.with_name(f"{beside.name}-merged{number}") for number in ("", *(f"-{n}" for n in range(2, 100))))
    return next(path for path in names if not path.exists())


def program_name() -> str:
    """How to call this program again: its name, or its path if the shell would not find the name."""
    called, here = Path(sys.argv[0]), Path.cwd()
    called = called.relative_to(here) if called.is_relative_to(here) else called
    return shlex.quote(str(called)) if called.name == "lorakit" and not shutil.which("lorakit") else "lorakit"


def metrics_table(result: Evaluation) -> Table:
    """Each metric of the base model and of the adapted one, with their 95 % intervals where they are known."""
    rows = []
    for name, values in result.metrics.items():
        ends = interval(result, name)
        cells = [metric_value(name, value) for value in values]
        if ends:
            cells = [f"{cell} ({own})" for cell, own in zip(cells, ends, strict=True)]
        rows.append((name, *cells))
    note = " (95 % interval)" if result.intervals else ""
    return Table(("metric", f"base{note}", f"adapter{note}"), tuple(rows))


def interval(result: Evaluation, name: str) -> tuple[str, ...]:
    """The 95 % intervals of a metric as text, of the base and of the adapted model; empty if they are not known."""
    found = result.intervals.get(name, ())
    return tuple(ends_text(name, ends) for ends in found)


def ends_text(metric: str, ends: Ends) -> str:
    """The interval of a metric as text."""
    return f"{metric_value(metric, ends[0])} to {metric_value(metric, ends[1])}"


def telling(samples: Sequence[Sample]) -> list[Sample]:
    """Samples in which base and adapter differ come first: they show what was learnt."""
    return sorted(samples, key=lambda sample: sample.base.strip() == sample.adapter.strip())


def metric_value(name: str, value: float) -> str:
    """A share as a percentage, anything else as a number."""
    return f"{value:.1%}" if is_share(name) else f"{value:.3f}"


def is_share(metric: str) -> bool:
    """Whether a metric is the share of the rows that are right."""
    return metric in ("exact match", "accuracy", "exact set match")


def one_line(text: str, width: int = 110) -> str:
    """The text on one line, cut to `width` characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 1] + "…"
