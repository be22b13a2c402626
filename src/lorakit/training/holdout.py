"""Hold rows out of the training split. If possible, none has the same question as a training row, each class has the
same share of both parts, and keeps a training row.

Rows with several labels are drawn without looking at them: a share of each label need not exist.
"""

from __future__ import annotations

import array
import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .bars import progress
from .shapes import Example

_MOST = 100


def hold_out(rows: Sequence[Example], share: float, seed: int, notes: list[str]) -> tuple[Sequence[int], Sequence[int]]:
    """The indices of the rows left to train on, and of the held-out rows: `share` of all, at random by `seed`, at most
    100.

    Rows that ask the same stay together, so that no question that is measured was trained on. If that would leave
    nothing to train on or to hold out, they are separated, and a note says so. Of each class as many rows are held out
    as its share of all rows says, to within the rows of one question.
    """
    if not share or len(rows) < 2:
        return range(len(rows)), ()
    count = min(max(1, round(share * len(rows))), _MOST, len(rows) - 1)
    drawn = random.Random(seed).sample(range(len(rows)), count)
    known = _Known(rows)
    chosen = _whole_groups(known, drawn, random.Random(seed)) or set(drawn)
    held = sorted(chosen)
    left = _others(held, len(rows))
    notes.append(f"{len(held)} of {len(rows)} rows held out for evaluation, chosen by the seed (--holdout {share:g})")
    classes = Counter(known.classes[held].tolist())
    if words := sorted(known.names[own] for own, many in classes.items() if many == known.sizes[own]):
        notes.append(f"no row is left to train on of the labels {', '.join(words)}; see --holdout")
    asked = Counter(known.asked[held].tolist())
    repeated = sum(many for key, many in asked.items() if many < len(known.places(key)))
    _say_repeats("valid", repeated, len(held), notes)
    return left, held


def _others(indices: Sequence[int], count: int) -> Sequence[int]:
    """The indices below `count` that are not among these, in order and in eight bytes each."""
    others = np.ones(count, bool)
    others[indices] = False
    found = array.array("q")
    found.frombytes(np.flatnonzero(others).data.cast("B"))
    return found


def note_repeats(splits: Mapping[str, Sequence[Example]], notes: list[str]) -> None:
    """Add a note on how many held-out rows ask the same as a training row."""
    held = {split: [_asked(row) for row in splits.get(split, ())] for split in ("valid", "test")}
    wanted = {key for keys in held.values() for key in keys}
    repeated = wanted and {key for row in splits["train"] if (key := _asked(row)) in wanted}
    for split, keys in held.items():
        _say_repeats(split, sum(key in repeated for key in keys), len(keys), notes)


def _say_repeats(split: str, repeated: int, count: int, notes: list[str]) -> None:
    if repeated:
        notes.append(
            f"{repeated} of the {count} {split} rows ask the same as training rows (duplicates): their score "
            "measures memory too"
        )


class _Known:
    """What is known of each row: eight bytes that stand for what it asks, and the number of its class."""

    def __init__(self, rows: Sequence[Example]) -> None:
        asked, classes = array.array("q"), array.array("i")
        numbers: dict[str, int] = {}
        for row in progress(rows, "looking for repeats"):
            asked.append(_asked(row))
            classes.append(numbers.setdefault(_class(row), len(numbers)))
        self.names = list(numbers)
        self.asked, self.classes = np.frombuffer(asked, np.int64), np.frombuffer(classes, np.intc)
        self.sizes = np.bincount(self.classes)  # rows of each class
        self._order = np.argsort(self.asked, kind="stable")

    def places(self, asked: int) -> range:
        """Where the rows that ask this stand among all rows when these are in order of what they ask."""
        start, stop = (
            int(np.searchsorted(self.asked, asked, side=side, sorter=self._order)) for side in ("left", "right")
        )
        return range(start, stop)

    def group(self, asked: int) -> list[int]:
        """The rows that ask this, in order."""
        places = self.places(asked)
        return list(self._order[places.start : places.stop].tolist())


def _whole_groups(known: _Known, drawn: Sequence[int], order: random.Random) -> set[int]:
    """The rows to hold out, as many as were drawn if possible: whole groups of rows that ask the same, of each class
    its share, and of no class its last row. Rows without a class count as one class. The result may be empty.
    """
    share = _shares(known.sizes, len(drawn))
    held, left = np.zeros_like(share), known.sizes.copy()
    chosen: set[int] = set()

    def take(groups: Iterable[list[int]], limit: int, over: bool = False) -> None:
        """Take groups up to `limit` rows. over: also a group that goes beyond the share of a class."""
        for group in groups:
            own, many = np.unique(known.classes[group], return_counts=True)
            fits = group[0] not in chosen and (held[own] + (1 if over else many) <= share[own]).all()
            if fits and len(chosen) + len(group) <= limit and (left[own] > many).all():
                chosen.update(group)
                held[own] += many
                left[own] -= many
            if len(chosen) == limit:
                return

    mixed = _Mixed(drawn, len(known.asked), order)
    take(_groups(known, mixed, held, share), len(drawn))
    if len(chosen) < len(drawn):
        take(_groups(known, mixed, held, share), len(drawn), over=True)
    if not chosen:  # every group is larger than the share: take the smallest, if it is not much larger
        share[:] = len(known.classes)
        mixed = _Mixed(drawn, len(known.asked), order)
        for group in sorted(_groups(known, mixed, held, share), key=len):
            take([group], 0 if chosen else 2 * len(drawn))
    return chosen


def _shares(sizes: Any, count: int) -> Any:
    """How many of `count` held-out rows each class gets: its exact share rounded down or up, and not all of its rows.

    Classes that would get none are rounded up first, then those whose share is cut most. What classes of a single row
    cannot give is taken from the others.
    """
    exact = count * sizes / sizes.sum()
    share = np.minimum(np.floor(exact).astype(np.int64), sizes - 1)
    for _ in range(count - int(share.sum())):
        can = [own for own in range(len(sizes)) if share[own] + 1 < sizes[own]]
        if can:
            share[min(can, key=lambda own: (share[own] > 0, share[own] - exact[own]))] += 1
    return share


class _Mixed:
    """The indices of all rows: those that were drawn, then all others in a random order, made when they are needed."""

    def __init__(self, drawn: Sequence[int], count: int, order: random.Random) -> None:
        self._drawn, self._count, self._order = drawn, count, order
        self._rest: Any = None

    def __iter__(self) -> Iterator[int]:
        yield from self._drawn
        if self._rest is None:
            self._rest = _others(self._drawn, self._count)
            self._order.shuffle(self._rest)
        yield from self._rest


def _groups(known: _Known, indices: Iterable[int], held: Any, share: Any) -> Iterator[list[int]]:
    """The rows that ask the same, together, in the order of the indices; without rows of classes that have their
    share already.
    """
    seen: set[int] = set()
    for index in indices:
        own = known.classes[index]
        if held[own] < share[own] and (key := int(known.asked[index])) not in seen:
            seen.add(key)
            yield known.group(key)


def _class(row: Example) -> str:
    """The class of a row; "" for all rows without a class."""
    return row.label if isinstance(row.label, str) else ""


def _asked(row: Example) -> int:
    """A number for what a row asks. Rows with equal numbers reveal each other's answers."""
    asked: Any = row.prompt
    if row.messages is not None:
        asked = [row.messages[:-1], row.tools]
    elif row.text is not None:
        asked = [row.text, row.text_pair]
    data = json.dumps(asked, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)
