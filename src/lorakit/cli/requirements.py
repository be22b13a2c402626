"""Check that the packages a command needs are installed and new enough, before the command begins.

The needed versions are read from the metadata of the installed lorakit package.
"""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata

_IMPORTED = {"pyyaml": "yaml"}  # package → the module's name, where it differs
_REQUIREMENT = re.compile(r"^([\w.-]+)\s*\(?>=\s*([\d.]+)\)?[^;]*;.*extra\s*==\s*['\"]([\w-]+)['\"]")


def check_packages(extra: str) -> None:
    """Raise ImportError naming each package of an extra that is missing or too old."""
    wrong = []
    for name, least in _needed(extra):
        found = _installed(name)
        if not found or _release(found) < _release(least):
            wrong.append(f"{name} {least} or newer ({f'{found} is' if found else 'not'} installed)")
    if wrong:
        raise ImportError(f"this command needs {', '.join(wrong)}")


def _installed(name: str) -> str:
    """The version of a package; empty if it is not installed or has no module."""
    try:
        return metadata.version(name) if importlib.util.find_spec(_IMPORTED.get(name, name)) else ""
    except metadata.PackageNotFoundError:
        return ""


def _needed(extra: str) -> list[tuple[str, str]]:
    """Names and minimum versions of an extra's packages; none if lorakit itself is not installed."""
    try:
        lines = metadata.requires("lorakit") or []
    except metadata.PackageNotFoundError:
        return []
    found = [match.groups() for line in lines if (match := _REQUIREMENT.match(line))]
    return [(name, least) for name, least, own in found if own == extra]


def _release(version: str) -> tuple[int, ...]:
    """The release numbers of a version: (5, 20, 0) for 5.20.0rc1."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, numbers.group().split("."))) if numbers else ()
