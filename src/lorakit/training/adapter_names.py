"""Adapters by name, as people write them on the command line, in a conversation and in rows.

    fr=runs/french        the folder runs/french under the name fr; a path alone takes the folder's name
    fr                    that adapter
    none                  the base model
    fr=0.7,de=0.3         the weighted sum of two

Imports nothing heavy: the flags of `lorakit --help` are made of this.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import LoraError
from ..core.paths import expanded
from ..core.words import suggestion

if TYPE_CHECKING:
    from ..bank.bank import Used

NONE = "none"


def named_path(text: str) -> tuple[str, str]:
    """The name and the path in NAME=PATH or PATH. A folder may have "=" in its own name."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name or Path(expanded(text)).exists():
        path = expanded(text)
        name = folder_name(path) if text.strip() else ""
    if not (name and path):
        raise LoraError(f"expected NAME=PATH or PATH, found {text!r}.")
    return name, expanded(path)


def folder_name(folder: str) -> str:
    """The name of an adapter that is given none: its folder's."""
    return os.path.basename(os.path.abspath(folder))


def shown_path(name: str, path: str) -> str:
    """What `named_path` reads as this name and path."""
    return path if name == folder_name(path) else f"{name}={path}"


def use_of(text: str, names: Collection[str]) -> Used:
    """The adapter, the base model (None) or the weights of the sum that a text means.

    Raises LoraError for a name that there is not, and for a weight that is no number.
    """
    text = text.strip()
    if text in names:  # a name may hold "=" or ","
        return text
    if text == NONE:
        return None
    if "=" not in text and "," not in text:
        raise LoraError(unknown(text, names))
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().rpartition("=")
        if not equals:
            raise LoraError(f"{part.strip()!r} in {text!r} has no weight. A sum is written NAME=WEIGHT,NAME=WEIGHT.")
        if name not in names:
            raise LoraError(unknown(name, names, words=()))
        if name in weights:
            raise LoraError(f"{name!r} stands twice in {text!r}.")
        weights[name] = _weight(number, text)
    return weights


def unknown(name: object, names: Collection[str], words: Collection[str] = (NONE,)) -> str:
    """What an error says of a name that no adapter has. words: what could have been meant besides a name."""
    there = f"there are {', '.join(names)}" if len(names) > 1 else f"there is {', '.join(names) or 'none'}"
    return f"no adapter is named {name!r}, {there}.{suggestion(str(name), [*names, *words])}"


def shown_use(used: Used) -> str:
    """What is used, as a person writes it."""
    if isinstance(used, Mapping):
        return ",".join(f"{name}={weight:g}" for name, weight in used.items())
    return NONE if used is None else used


def _weight(text: str, where: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise LoraError(f"expected a number as a weight in {where!r}, found {text.strip()!r}.")
    return weight
