"""Numbers as the tables of `study` show them, and as its JSON files hold them."""

from __future__ import annotations

import math
from typing import Any

_DIGITS = 6  # significant ones


def rounded(value: Any) -> Any:
    """`value` with every float in it, keys too, to six digits; a number that does not exist is None, a tuple a list."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {rounded(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def number(value: float | None, digits: int = 3) -> str:
    """To a few significant digits; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:#.{digits}g}".rstrip(".") if 1e-3 <= abs(value) < 10**digits else f"{value:.{digits}g}"
