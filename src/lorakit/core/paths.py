"""Paths as people write them. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> str:
    """`path` with a leading ~ replaced by the home folder. A shell does so only at the start of unquoted words.

    The result is text: a Path would drop what tells a path from a hub id: the dot of ./name, the slash of name/.
    """
    return os.path.expanduser(path)
