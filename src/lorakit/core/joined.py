"""A class made of two: an adapted kind, and behind it the class that a module has already."""

from __future__ import annotations

import functools
from typing import Any


def joined(first: Any, second: Any, name: str = "") -> Any:
    """The class with the bases `first` and `second`, made once. It is named `name`, or like `first`. It cannot be
    imported by that name, so its objects pickle by its parts.
    """
    return _joined(first, second, name or first.__name__)


@functools.cache
def _joined(first: Any, second: Any, name: str) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        return _new_joined, (first, second, name), self.__dict__

    members = {"__module__": first.__module__, "__doc__": second.__doc__, "__reduce_ex__": reduce}
    members["plain_class"] = second
    # If a property of `second` computes the weight (a parametrisation), it takes precedence over the one of `first`.
    if isinstance(getattr(second, "weight", None), property):
        members["weight"] = second.weight
    return type(name, (first, second), members)


def _new_joined(first: Any, second: Any, name: str) -> Any:
    cls = _joined(first, second, name)
    return cls.__new__(cls)
