"""What the terminal can show: how wide it is, whether it takes colours, whether something may move on it.

Where the output is no terminal, but a file or a pipe, lines keep their length and nothing is coloured. `NO_COLOR`
(https://no-color.org) turns colours off, and `TERM=dumb` names a terminal that can only print lines.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap

_ENDLESS = 1 << 30
_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # C0 and C1 without line feed and tab


def columns(otherwise: int) -> int:
    """The width of the terminal in characters, or `otherwise` if there is none."""
    return shutil.get_terminal_size((otherwise, 24)).columns


def takes_colours() -> bool:
    """Whether what is written to standard output may be coloured."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not _is_dumb()


def is_watched() -> bool:
    """Whether standard error is a terminal on which progress bars move."""
    return sys.stderr.isatty() and not _is_dumb()


def to_width(line: str) -> str:
    """The line broken between words at the width of the terminal, its further lines indented. A path stays whole."""
    return textwrap.fill(
        line, columns(_ENDLESS), subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def without_commands(text: str) -> str:
    """The text with � for each character that a terminal obeys, as it does for colours. Line ends and tabs stay."""
    return _COMMANDS.sub("�", text)


def streamed(piece: str) -> str:
    """A piece of an answer as it is printed: on a terminal without commands, and elsewhere as it is."""
    return without_commands(piece) if sys.stdout.isatty() else piece


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"
