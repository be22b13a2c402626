"""Whether the packages that a command needs are installed, and new enough: asked before the command begins.

What is needed is read where it is declared, in the installed package's own metadata.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

_IMPORTED = {"pyyaml": "yaml"}  # by another name than it is installed by
_REQUIREMENT = re.compile(r"^([\w.-]+)\s*\(?>=\s*([\d.]+)\)?[^;]*;.*extra\s*==\s*['\"]([\w-]+)['\"]")


def check(extra: str) -> None:
    """Raise ImportError naming each package of an extra that is missing or too old."""
    wrong = []
    for name, least in _needed(extra):
        found = _installed(name)
        if not found or _release(found) < _release(least):
            wrong.append(f"{name} {least} or newer ({f'{found} is' if found else 'not'} installed)")
    if wrong:
        raise ImportError(f"this command needs {', '.join(wrong)}")


def _installed(name: str) -> str:
    """The version of a package; nothing where it is not there or cannot be imported."""
    try:
        return metadata.version(name) if importlib.util.find_spec(_IMPORTED.get(name, name)) else ""
    except metadata.PackageNotFoundError:
        return ""


def _needed(extra: str) -> list[tuple[str, str]]:
    """Names and least versions; none where lorakit itself was not installed."""
    try:
        lines = metadata.requires("lorakit") or []
    except metadata.PackageNotFoundError:
        return []
    found = [match.groups() for line in lines if (match := _REQUIREMENT.match(line))]
    return [(name, least) for name, least, own in found if own == extra]


def _release(version: str) -> tuple[int, ...]:
    """(5, 20, 0) of 5.20.0rc1: what decides between versions that are years apart."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()
