"""What the terminal can show: how wide it is, whether it takes colours, whether something may move on it.

Where the output is no terminal, but a file or a pipe, lines keep their length and nothing is coloured. `NO_COLOR`
(https://no-color.org) turns colours off, and `TERM=dumb` names a terminal that can only print lines.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

_ENDLESS = 1 << 30


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


def _is_dumb() -> bool:
    return os.environ.get("TERM") == "dumb"
