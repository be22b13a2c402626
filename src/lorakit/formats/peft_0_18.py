"""PEFT's adapter folder as PEFT up to 0.18.1 reads it: the same but for stacks of experts, see `peft_experts.py`.

It is written when it is asked for by its name. All such folders are read as `peft` reads them.
"""

from __future__ import annotations

from pathlib import Path

from ..core.adapter import Adapter
from .peft import limits as limits
from .peft import read as read
from .peft import write_of

name = "peft-0.18"


def recognises(path: Path) -> bool:
    """None: what is in a folder tells `peft` of which time it is."""
    return False


def write(adapter: Adapter, folder: str | Path) -> None:
    """Write the two files. Raises LoraError as `peft.write` does, and for stacks that were read without a model."""
    write_of(adapter, folder, "old")
