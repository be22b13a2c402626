"""Find what labels are for: classes, or numbers to predict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from .rows import DataError
from .shapes import Example
from .spool import viewed

Splits = Mapping[str, Sequence[Example]]


def with_labels(splits: Splits, task: str, notes: list[str]) -> tuple[str, tuple[str, ...], Splits]:
    """The task, its classes (none for a regression), and the examples with labels in the form that the task needs.

    task: "classification", "regression", or "auto": a regression if all labels are numbers and one has a fraction.
    Raises DataError for labels that the task cannot have, and if all training labels are equal.
    """
    everything = itertools.chain.from_iterable(splits.values())
    fraction = next((e for e in everything if (n := number_of(e.label)) is not None and not n.is_integer()), None)
    if task == "regression" or (task == "auto" and fraction is not None):
        everything = itertools.chain.from_iterable(splits.values())
        if words := [example for example in everything if number_of(example.label) is None]:
            # Otherwise one word among numbers would turn every number into a class.
            why = "--task regression"
            if task == "auto" and fraction is not None:
                why = f"{fraction.where} has {fraction.label}; for classes: --task classification"
            raise DataError([f"{e.where}: the label {e.label!r} is not a number ({why})" for e in words])
        numbers = {
            split: viewed(rows, lambda row: replace(row, label=number_of(row.label))) for split, rows in splits.items()
        }
        _told_apart({example.label for example in numbers["train"]})
        return "regression", (), numbers
    named = {
        split: viewed(rows, lambda row: replace(row, label=_class_name(row.label))) for split, rows in splits.items()
    }
    seen = {str(example.label) for example in named["train"]}
    _told_apart(seen)
    unseen = [
        f"{e.where}: the label {e.label!r} does not occur in train"
        for split in ("valid", "test")
        for e in named[split]
        if str(e.label) not in seen
    ]
    if unseen:
        raise DataError(unseen)
    numeric = all(number_of(label) is not None for label in seen)
    labels = sorted(seen, key=(lambda label: (float(label), label)) if numeric else None)
    if numeric and len(labels) > 2 and task == "auto":
        notes.append(f"the labels {', '.join(labels[:5])}, … are taken as {len(labels)} classes; to predict them as "
                     "numbers: --task regression")  # fmt: skip
    return "classification", tuple(labels), named


def _told_apart(labels: Collection[str | float | None]) -> None:
    if len(labels) < 2:
        only = next(iter(labels), None)
        raise DataError([f"all rows of the training split have the label {only!r}; there is nothing to tell apart"])


def number_of(label: str | float | None) -> float | None:
    """The label as a finite number, or None for any other label."""
    try:
        number = float(label) if label is not None else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _class_name(label: str | float | None) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
