"""Lists of what is wrong: a cause that many rows share is said once, with the rows."""

from __future__ import annotations

import re
from collections.abc import Sequence

_FEW = 5  # rows of one cause that still have a line each
_PLACE = re.compile(r"(?P<file>.+?)(?P<before>:| row |\[)(?P<number>\d+)(?P<after>\]?): (?P<cause>.*)", re.DOTALL)
_RANGES = 30


def grouped(problems: Sequence[str]) -> list[str]:
    """Each "file:line: cause", in order; of a cause that more than `_FEW` rows share the first, with the others' lines.

    data.jsonl:2: prompt is null (41 more such rows: 3-20, 24, 31-52)
    """
    lines: dict[tuple[str, ...], list[int]] = {}
    keys = []
    for problem in problems:
        found = _PLACE.fullmatch(problem)
        key = (found["file"], found["before"], found["after"], found["cause"]) if found else (problem,)
        lines.setdefault(key, []).append(int(found["number"]) if found else 0)
        keys.append(key)
    shown: dict[str, None] = {}
    for problem, key in zip(problems, keys, strict=True):
        if len(key) == 1 or len(lines[key]) <= _FEW:
            shown[problem] = None
        else:
            (file, before, after, cause), (first, *others) = key, lines[key]
            shown[f"{file}{before}{first}{after}: {cause} ({len(others)} more such rows: {_ranges(others)})"] = None
    return list(shown)


def _ranges(numbers: Sequence[int]) -> str:
    """3, 4, 5, 9 as 3-5, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    listed = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_RANGES]]
    return ", ".join(listed) + (", …" if len(runs) > _RANGES else "")
