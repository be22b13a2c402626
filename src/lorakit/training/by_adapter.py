"""Training rows that name their adapter ("adapter": "fr"): each adapter learns its own rows, as it would alone."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from .adapter_names import NONE
from .conversations import BadRow
from .holdout import hold_out
from .rows import DataError, Row
from .shapes import Example
from .spool import picked

_NAME = re.compile(r"\w[\w.-]*")  # it becomes the name of a folder


def learner(row: Row) -> str:
    """The adapter that learns a row. Raises BadRow for what cannot be the name of one."""
    name = row.values["adapter"]
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == NONE:
        raise BadRow(f"adapter: expected a name of letters, digits and _ - . that is not {NONE!r}, found {name!r}.")
    return name


def learners(examples: Mapping[str, Sequence[Example]], notes: list[str]) -> tuple[str, ...]:
    """The adapters that training rows name, in order, where some row names one.

    Raises DataError if some rows name none, or if a row that is held out names one that nothing is learnt for.
    """
    counts = Counter(example.adapter for example in examples["train"])
    names = tuple(name for name in counts if name is not None)
    problems = []
    for example in itertools.chain.from_iterable(examples.values()):
        if example.adapter is None:
            problems.append(f"{example.where}: names no adapter, and other rows do.")
        elif example.adapter not in counts:
            problems.append(f"{example.where}: no training row is for the adapter {example.adapter!r}.")
    if problems:
        raise DataError(problems)
    listed = ", ".join(f"{name} {counts[name]}" for name in names)
    notes.append(f"rows name their adapters, each of which learns its own: {listed}")
    return names


def hold_out_of_each(
    rows: Sequence[Example], names: Sequence[str], share: float, seed: int, notes: list[str]
) -> tuple[Sequence[int], Sequence[int]]:
    """`hold_out`, of each adapter's rows as if there were no others; of all rows if they name none."""
    if not names:
        return hold_out(rows, share, seed, notes)
    owners = np.array([names.index(str(row.adapter)) for row in rows])
    left: list[int] = []
    held: list[int] = []
    for place, name in enumerate(names):
        own = np.flatnonzero(owners == place)
        said: list[str] = []
        for found, all_found in zip(hold_out(picked(rows, own.tolist()), share, seed, said), (left, held), strict=True):
            all_found.extend(own[list(found)].tolist())
        notes += [f"{name}: {note}" for note in said]
    return sorted(left), sorted(held)
