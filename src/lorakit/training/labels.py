"""Find what labels are for: a class for each row, several (multi-label), or numbers to predict."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from .rows import DataError
from .shapes import Example, Label
from .spool import viewed

MULTI_LABEL = "multi-label"  # the task of rows that have any number of classes

Splits = Mapping[str, Sequence[Example]]


def with_labels(splits: Splits, task: str, notes: list[str]) -> tuple[str, tuple[str, ...], Splits]:
    """The task, its classes (none for a regression), and the examples with labels in the form that the task needs.

    task: "classification", "regression", or "auto": a regression if all labels are numbers and one has a fraction, and
    multi-label if they are lists of classes.
    Raises DataError for labels that the task cannot have, and if all training labels are equal.
    """
    if any(isinstance(example.label, tuple) for example in itertools.chain.from_iterable(splits.values())):
        return _several(splits, [example for rows in splits.values() for example in rows], task)
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
    labels = sorted(seen, key=_by_number if numeric else None)
    if numeric and len(labels) > 2 and task == "auto":
        notes.append(f"the labels {', '.join(labels[:5])}, … are taken as {len(labels)} classes; to predict them as "
                     "numbers: --task regression")  # fmt: skip
    return "classification", tuple(labels), named


def _several(splits: Splits, everything: Sequence[Example], task: str) -> tuple[str, tuple[str, ...], Splits]:
    """`with_labels` of rows whose labels are lists of classes."""
    lists = [example for example in everything if isinstance(example.label, tuple)]
    single = [example for example in everything if not isinstance(example.label, tuple)]
    if task != "auto":
        raise DataError(
            [f"{e.where}: the label is a list of classes, which --task {task} does not take" for e in lists]
        )
    if len(lists) < len(single):  # the fewer rows are the wrong ones
        raise DataError([f"{e.where}: the label is a list, and most rows have a class or a number" for e in lists])
    if single:
        raise DataError([f"{e.where}: the label {e.label!r} is no list, and other rows have lists" for e in single])
    train = [classes_of(example) for example in splits["train"]]
    _told_apart(set(map(frozenset, train)))
    seen = {label for classes in train for label in classes}
    labels = tuple(sorted(seen, key=_by_number if all(number_of(label) is not None for label in seen) else None))
    unseen = [
        f"{e.where}: the label {label!r} does not occur in train"
        for split in ("valid", "test")
        for e in splits[split]
        for label in classes_of(e)
        if label not in seen
    ]
    if unseen:
        raise DataError(unseen)
    ordered = {
        split: [replace(e, label=as_listed(classes_of(e), labels)) for e in rows] for split, rows in splits.items()
    }
    return MULTI_LABEL, labels, ordered


def classes_of(example: Example) -> tuple[str, ...]:
    """The classes of a multi-label row."""
    assert isinstance(example.label, tuple)
    return example.label


def as_listed(classes: Collection[str], labels: Sequence[str]) -> tuple[str, ...]:
    """Those of all `labels` that are among `classes`."""
    return tuple(label for label in labels if label in classes)


def _by_number(label: str) -> tuple[float, str]:
    return float(label), label


def _told_apart(labels: Collection[Label | frozenset[str] | None]) -> None:
    if len(labels) < 2:
        first = next(iter(labels), None)
        only = sorted(first) if isinstance(first, frozenset) else first
        raise DataError([f"all rows of the training split have the label {only!r}; there is nothing to tell apart"])


def number_of(label: Label | None) -> float | None:
    """The label as a finite number, or None for any other label."""
    if label is None or isinstance(label, tuple):
        return None
    try:
        number = float(label)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _class_name(label: Label | None) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)
