"""Convert a setting's value to its type, check its limits, and say what is wrong."""

from __future__ import annotations

import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ..core.words import shown, suggestion

# No count of rows, steps or tokens is larger, and other libraries hold them in 32 bits.
_LARGEST = 2**31 - 1
_LIMITS = {
    "above": ("more than", operator.gt),
    "at_least": ("at least", operator.ge),
    "below": ("less than", operator.lt),
    "at_most": ("at most", operator.le),
}


def value_text(value: Any) -> str:
    """A setting's value as a person reads it: "q_proj,v_proj", "0.0002", "none"."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def converted(value: Any, wanted: Any, limits: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """`value` as the type `wanted`; what is wrong with it is added to `problems`, with `where` it stands."""
    try:
        found = as_type(value, wanted)
    except (ValueError, TypeError, OverflowError):
        options = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
        expected = "a finite number" if _is_infinite(value) else describe(wanted)
        problems.append(f"{where}: expected {expected}, found {shown(value)}.{suggestion(str(value), options)}")
        return None
    problem = outside(found, limits)
    if problem:
        problems.append(f"{where}: expected {problem}, found {shown(value)}.")
    return found


def as_type(value: Any, wanted: Any) -> Any:
    """`value`, which may be text, as the type `wanted`. Raises ValueError or TypeError if it is not one."""
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return as_type(value, next(option for option in options if option is not type(None)))
    if origin is Literal:
        if value not in options:
            raise ValueError
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError
        return tuple(part.strip() for part in parts if part.strip())
    if wanted is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or value is None or isinstance(value, list | tuple | dict | set):
        raise ValueError
    if wanted is str:
        return str(value)
    if wanted is int and isinstance(value, int):
        return value  # exact; a float would round a large one
    number = float(value)  # PyYAML reads 2e-4 as text
    if not math.isfinite(number) or (wanted is int and not number.is_integer()):
        raise ValueError
    return int(number) if wanted is int else number


def outside(value: Any, limits: Mapping[str, Any]) -> str | None:
    """What a value outside its limits must be; None if it is within them."""
    if isinstance(value, str | tuple):
        empty = not value.strip() if isinstance(value, str) else not value
        return "a name" if empty and "not_empty" in limits else None
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    if isinstance(value, int):
        limits = {"at_most": _LARGEST, **limits}
    for name, (words, holds) in _LIMITS.items():
        if name in limits and not holds(value, limits[name]):
            return f"{words} {limits[name]:.10g}"
    return None


def describe(wanted: Any) -> str:
    """A type in the words of an error message."""
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return describe(next(option for option in options if option is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is tuple:
        return "names separated by commas"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]


def _is_infinite(value: Any) -> bool:
    try:
        return math.isinf(float(value))
    except (ValueError, TypeError, OverflowError):
        return False
