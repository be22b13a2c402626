"""How good the answers are: exact match of text, accuracy of classes, F1 of sets of classes, correlation of numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from typing import Any


def exact_match(answer: str, expected: str) -> bool:
    """Whether the two are the same text up to surrounding white space, or the same JSON object or list.

    JSON is compared as data, so the order of keys and the spacing do not count; a bare number or string is text.
    """
    if answer.strip() == expected.strip():
        return True
    wanted = _container(expected)
    return wanted is not None and _same(_container(answer), wanted)


def accuracy(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    """The share of equal pairs, in [0, 1]."""
    return sum(bool(p == e) for p, e in zip(predicted, expected, strict=True)) / len(expected)


def class_counts(
    predicted: Sequence[Collection[str]], expected: Sequence[Collection[str]]
) -> tuple[list[int], list[int]]:
    """For each multi-label row: its classes that are both predicted and expected, and those predicted plus expected."""
    pairs = [(set(one), set(other)) for one, other in zip(predicted, expected, strict=True)]
    return [len(one & other) for one, other in pairs], [len(one) + len(other) for one, other in pairs]


def f1_of_counts(right: float, named: float) -> float:
    """2 right / named, in [0, 1]; 0 if neither side names a class. right, named: `class_counts`, summed over rows."""
    return 2 * right / named if named else 0.0


def pearson(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation, in [−1, 1]; 0 where one side is constant."""
    if any(all(value == side[0] for value in side) for side in (predicted, expected)):
        return 0.0  # the mean of a constant is rounded, and the deviations from it would be noise, not 0
    mean_p, mean_e = sum(predicted) / len(predicted), sum(expected) / len(expected)
    pairs = [(p - mean_p, e - mean_e) for p, e in zip(predicted, expected, strict=True)]
    norm = math.sqrt(sum(p * p for p, _ in pairs) * sum(e * e for _, e in pairs))
    return sum(p * e for p, e in pairs) / norm if norm else 0.0


def _container(text: str) -> Any:
    """The JSON object or list that `text` is, or None."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict | list) else None


def _same(a: Any, b: Any) -> bool:
    """Equality of JSON data; true is not 1, as it is in Python."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)
