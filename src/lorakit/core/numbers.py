"""How numbers are printed: sizes, durations, shares, rates and significant digits, in text, tables, plots and pages.

Whole numbers are printed with Python's own `f"{count:,}"`.
"""

from __future__ import annotations

import math
import re
from typing import Any

from .errors import LoraError

NONE = "–"  # stands where there is no number
_STORED = 6  # significant digits of a number in a JSON file


def size(count: float) -> str:
    """Bytes in the unit that fits: 147 kB, 9.4 MB, 1.42 GB."""
    if count >= 1e6:
        return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
    return f"{count / 1e3:.0f} kB"


def size_in(text: str) -> int:
    """The bytes of a size as people write it: 512MB, 24 GB, 1.5GiB. Raises LoraError for anything else, and for 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])(i?)b", text.strip(), re.IGNORECASE)
    if not found:
        raise LoraError(f"{text!r} is no size such as 24GB, 24GiB or 512MB")
    number, unit, binary = found.groups()
    power = "kmgt".index(unit.lower()) + 1
    count = round(float(number) * (1024.0 if binary else 1000.0) ** power)
    if not count:
        raise LoraError(f"{text!r} is no size above 0")
    return count


def duration(seconds: float) -> str:
    """A time in the unit that fits: 40 s, 7 min, 1.6 h."""
    if seconds < 180:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seconds_in(text: str) -> float:
    """The seconds of a time as people write it: 90s, 30 min, 1.5h. Raises LoraError for anything else, and for 0."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h)", text.strip(), re.IGNORECASE)
    if not found:
        raise LoraError(f"{text!r} is no time such as 90s, 30m or 2h")
    seconds = float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2][0].lower()]
    if not seconds:
        raise LoraError(f"{text!r} is no time above 0")
    return seconds


def short_number(value: float | None, digits: int = 3) -> str:
    """A number to a few significant digits: 0.120, 12.3, 1.23e+03. A dash where there is none."""
    if value is None:
        return NONE
    return f"{value:#.{digits}g}".rstrip(".") if 1e-3 <= abs(value) < 10**digits else f"{value:.{digits}g}"


def percent(share: float | None) -> str:
    """A share of one as a percentage, to a few significant digits."""
    return NONE if share is None else f"{short_number(100 * share)}%"


def learning_rate(value: float) -> str:
    """A learning rate as papers write it: 2e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def short_count(count: float) -> str:
    """A round count as the axis of a plot shows it: 500, 10k, 2M, 1B."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= unit:
            return f"{count / unit:g}{name}"
    return f"{count:g}"


def rounded(value: Any) -> Any:
    """`value` for JSON: floats, in keys too, have six digits. NaN and infinity become None, and tuples become lists."""
    if isinstance(value, float):
        return float(f"{value:.{_STORED}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {rounded(key): rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
