"""Several data sets in one run, each with a weight: how many times its training rows are read in an epoch.

    a.jsonl,b.jsonl=0.3,c.jsonl=2       all of a, three tenths of b, c twice

The rows of a fraction are drawn once, by the seed, so each epoch reads the same ones. Weights say nothing of valid and
test: all of their rows are scored.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..core.errors import LoraError
from ..core.paths import expanded

T = TypeVar("T")
_MOST = 1000.0  # times that a data set is read in an epoch


@dataclass(frozen=True)
class Source:
    """A data set: a path or a hub id, and its weight."""

    name: str
    weight: float = 1.0


def sources(data: str) -> list[Source]:
    """The data sets that `--data` names. An existing path always wins, also if commas or = stand in it.

    Raises LoraError for a weight that is no number above 0.
    """
    parts = data.split(",")
    found: list[Source] = []
    start = 0
    while start < len(parts):
        stops = range(len(parts), start, -1)
        read = ((stop, _source(",".join(parts[start:stop]))) for stop in stops)
        stop, source = next(((s, own) for s, own in read if own and _is_path(own.name)), (start + 1, None))
        if source is None and parts[start].strip():
            source = _source(parts[start]) or Source(parts[start].strip())
        if source is not None:
            found.append(source)
        start = stop
    return found or [Source(data)]


def weighted(rows: Sequence[T], weight: float, seed: int) -> list[T]:
    """The rows in their order, each as often as the weight says; the rows of a fraction are drawn by the seed."""
    whole = int(weight)
    count = round((weight - whole) * len(rows))
    if rows and not whole:
        count = max(count, 1)
    drawn = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for index, row in enumerate(rows) for _ in range(whole + (index in drawn))]


def _source(text: str) -> Source | None:
    """The data set of "name" or "name=weight"; None if the text is a name alone that is no path."""
    text = text.strip()
    if _is_path(text):
        return Source(text)
    name, equals, number = text.rpartition("=")
    if not equals or not name:
        return None
    try:
        weight = float(number)
    except ValueError:
        weight = -1.0
    if not 0 < weight <= _MOST:
        if _is_path(name) or number.strip("+-.0123456789eE") == "" or number in ("nan", "inf"):
            raise LoraError(f"--data {text}: a weight is a number above 0, at most {_MOST:g}, found {number!r}.")
        return None
    return Source(name.strip(), weight)


def _is_path(name: str) -> bool:
    return bool(name) and os.path.exists(expanded(name))
