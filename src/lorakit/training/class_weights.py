"""How much each class counts in the loss of a classifier: `--class-weights balanced`, or a number for some classes.

    balanced    w_c = rows / (classes · rows of c): each class weighs the same in all, however rare it is
    a=1,b=3     w_b = 3; a class that is not named has 1

The loss of a batch is torch's weighted cross-entropy, Σ w_y (−log p_y) / Σ w_y, so only their ratios matter.
"""

from __future__ import annotations

import math
import re
from collections import Counter

from ..core.errors import LoraError
from ..core.words import suggestion
from .data import Data

BALANCED = "balanced"
_ONE = re.compile(r"\s*(.+?)\s*=([^,=]+)(?:,|$)")  # a name may hold commas and =, a number does not


def class_weights(asked: str | None, data: Data) -> tuple[float, ...] | None:
    """The weight of each class, in the order of `data.labels`; None if nothing was asked for.

    Raises LoraError for data without classes, a class that they do not have, and a weight that is no number above 0.
    """
    if asked is None:
        return None
    if data.task != "classification":
        raise LoraError(f"--class-weights is for rows that have one class each; these are for {data.task}.")
    if asked.strip() == BALANCED:
        counts = Counter(str(example.label) for example in data.train)
        if missing := [label for label in data.labels if not counts[label]]:
            raise LoraError(f"--class-weights {BALANCED}: no training row has the class {missing[0]!r}.")
        return tuple(len(data.train) / (len(data.labels) * counts[label]) for label in data.labels)
    given = _given(asked)
    for name in given:
        if name not in data.labels:
            listed = ", ".join(data.labels)
            raise LoraError(f"--class-weights: no class {name!r}; found: {listed}.{suggestion(name, data.labels)}")
    return tuple(given.get(label, 1.0) for label in data.labels)


def _given(asked: str) -> dict[str, float]:
    """The weights in "a=1,b=3"."""
    found: dict[str, float] = {}
    place = 0
    while place < len(asked) or not found:
        one = _ONE.match(asked, place)
        if one is None:
            raise LoraError(f"--class-weights {asked!r}: expected {BALANCED}, or CLASS=WEIGHT,CLASS=WEIGHT.")
        name, number = one.group(1), one.group(2).strip()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):
            raise LoraError(f"--class-weights: the weight of {name!r} is {number!r}, expected a number above 0.")
        if name in found:
            raise LoraError(f"--class-weights: {name!r} has two weights, {found[name]:g} and {weight:g}.")
        found[name] = weight
        place = one.end()
    return found
