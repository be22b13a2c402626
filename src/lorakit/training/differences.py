"""Where an answer differs from the expected one, word by word, so that a page can mark it.

answer     {"room": "⟦kitchen⟧", "on": true}
expected   {"room": "⟦bath⟧", "on": true}
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

Piece = tuple[str, bool]  # a part of a text, and whether the other text lacks it

_WORD = re.compile(r"\w+|\s+|[^\w\s]")
_ALIKE = 0.4  # difflib's ratio, from 0 to 1. Between less similar texts, common words are chance


def word_differences(answer: str, expected: str) -> tuple[list[Piece], list[Piece]]:
    """The pieces of both texts; joined they are the texts. Words, runs of white space and signs are compared whole.

    Texts with little in common differ as a whole.
    """
    ours, theirs = _WORD.findall(answer), _WORD.findall(expected)
    matcher = SequenceMatcher(None, ours, theirs, autojunk=False)
    if matcher.ratio() < _ALIKE:
        return _filled([(answer, True)]), _filled([(expected, True)])
    left: list[Piece] = []
    right: list[Piece] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        left.append(("".join(ours[a:b]), kind != "equal"))
        right.append(("".join(theirs[c:d]), kind != "equal"))
    return _filled(left), _filled(right)


def _filled(pieces: Iterable[Piece]) -> list[Piece]:
    return [piece for piece in pieces if piece[0]]
