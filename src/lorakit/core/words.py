"""What an error says of a misspelt word and of a value: plain English, short, on one line. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def suggestion(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Did you mean …?, with a space in front, or nothing."""
    return did_you_mean(nearest(word, known, cutoff))


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The known word that a misspelt one is most like, or nothing. Capital letters do not count, and the word itself is
    never found. cutoff: the share of letters, of 1, that both must have in common.
    """
    others = {own.lower(): own for own in known if own != word}
    near = difflib.get_close_matches(word.lower(), others, n=1, cutoff=cutoff)
    return others[near[0]] if near else ""


def did_you_mean(word: str) -> str:
    """The question that an error ends with, with a space in front. Nothing where there is no word."""
    return f" Did you mean {word!r}?" if word else ""


def shown(value: Any) -> str:
    """A value as an error repeats it: as Python writes it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}… ({len(text):,} characters)"
