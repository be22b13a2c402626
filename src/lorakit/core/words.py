"""What an error says about a misspelt word, a value and another error, on one line. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def suggestion(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question "Did you mean …?" for the nearest known word, with a space in front; empty without such a word."""
    return did_you_mean(nearest(word, known, cutoff))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word most like a misspelt one, or an empty text. Case does not matter, and the word itself is never
    found. cutoff: the least similarity, from 0 to 1 (`difflib`'s ratio).
    """
    others = {own.lower(): own for own in known if own != word}
    near = difflib.get_close_matches(word.lower(), others, n=1, cutoff=cutoff)
    return others[near[0]] if near else ""


def did_you_mean(word: str) -> str:
    """The question that an error ends with, with a space in front. It is empty if there is no word."""
    return f" Did you mean {word!r}?" if word else ""


def shown(value: Any) -> str:
    """A value as an error repeats it: its `repr`, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"


def first_line(error: BaseException) -> str:
    """The first line of an error's message that is not blank, cut if it is long. It is empty without a message."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if len(line) <= 300 else f"{line[:300]}…"
