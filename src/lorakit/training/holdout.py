"""Hold rows out of the training split. If possible, none has the same question as a training row, and each class keeps
a training row.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from .shapes import Example

_MOST = 100


def hold_out(rows: Sequence[Example], share: float, seed: int, notes: list[str]) -> tuple[list[Example], list[Example]]:
    """The rows left to train on, and the held-out rows: `share` of all, at random by `seed`, at most 100.

    Rows that ask the same stay together, so that no question that is measured was trained on. If that would leave
    nothing to train on or to hold out, they are separated, and a note says so.
    """
    if not share or len(rows) < 2:
        return list(rows), []
    count = min(max(1, round(share * len(rows))), _MOST, len(rows) - 1)
    drawn = random.Random(seed).sample(range(len(rows)), count)
    chosen = _whole_groups(rows, drawn, random.Random(seed)) or set(drawn)
    held = [row for index, row in enumerate(rows) if index in chosen]
    left = [row for index, row in enumerate(rows) if index not in chosen]
    notes.append(f"{len(held)} of {len(rows)} rows held out for evaluation, chosen by the seed (--holdout {share:g})")
    if missing := sorted({_class(row) for row in rows} - {_class(row) for row in left}):
        notes.append(f"no row is left to train on of the labels {', '.join(missing)}; see --holdout")
    note_repeats({"train": left, "valid": held}, notes)
    return left, held


def note_repeats(splits: dict[str, list[Example]], notes: list[str]) -> None:
    """Add a note on how many held-out rows ask the same as a training row."""
    trained = {_asked(row) for row in splits["train"]}
    for split in ("valid", "test"):
        rows = splits.get(split, [])
        if repeated := sum(_asked(row) in trained for row in rows):
            notes.append(
                f"{repeated} of the {len(rows)} {split} rows ask the same as training rows (duplicates): their score "
                "measures memory too"
            )


def _whole_groups(rows: Sequence[Example], drawn: Sequence[int], order: random.Random) -> set[int]:
    """The drawn rows, changed so that rows that ask the same stay together and no class loses its last row.

    The result may be empty.
    """
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_asked(row), []).append(index)
    left = Counter(map(_class, rows))
    chosen: set[int] = set()

    def take(group: list[int], limit: int) -> None:
        gone = Counter(_class(rows[index]) for index in group)
        # Rows without a class count as one class, so that something is left to train on.
        if len(chosen) + len(group) <= limit and all(left[label] > many for label, many in gone.items()):
            chosen.update(group)
            left.subtract(gone)

    rest = sorted(set(range(len(rows))) - set(drawn))
    order.shuffle(rest)
    candidates = list({_asked(rows[index]): groups[_asked(rows[index])] for index in (*drawn, *rest)}.values())
    for group in candidates:
        take(group, len(drawn))
    if not chosen:  # every group is larger than the share: take the smallest, if it is not much larger
        for group in sorted(candidates, key=len):
            take(group, 0 if chosen else 2 * len(drawn))
    return chosen


def _class(row: Example) -> str:
    """The class of a row; "" for all rows without a class."""
    return row.label if isinstance(row.label, str) else ""


def _asked(row: Example) -> str:
    """What a row asks, as text. Rows with equal text reveal each other's answers."""
    asked: Any = row.prompt
    if row.messages is not None:
        asked = [row.messages[:-1], row.tools]
    elif row.text is not None:
        asked = [row.text, row.text_pair]
    return json.dumps(asked, sort_keys=True, default=str)
