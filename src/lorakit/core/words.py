"""What an error says of a misspelt word and of a value: plain English, short, on one line. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def suggestion(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Did you mean …?, or nothing. Capital letters do not count, and the word itself is never suggested."""
    others = {own.lower(): own for own in known if own != word}
    near = difflib.get_close_matches(word.lower(), others, n=1, cutoff=cutoff)
    return f" Did you mean {others[near[0]]!r}?" if near else ""


def shown(value: Any) -> str:
    """A value as an error repeats it: as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
