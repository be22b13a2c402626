"""The checkpoints of a run: which are there, and which of them are whole.

`trainers.py` writes a checkpoint under another name and renames it, so an interruption leaves no partial checkpoint.
Still, one may be incomplete: an older version wrote it, a disk lost a part, or a person removed a file.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
from safetensors import safe_open

STATE = "adapter_state.safetensors"  # in a checkpoint: the adapter's tensors as the model names them
BEST = "best_state.safetensors"  # the same, after the best evaluation so far, with --keep best
RUN = "run.json"  # in a checkpoint: the record of the run that it belongs to
TRAINER_STATE = "trainer_state.json"
SEARCH = "auto"  # beside checkpoints: the folder of what `--auto` has come to so far
SEARCHED = "search.json"  # in it: what was tried


def step_of(checkpoint: str | Path) -> int:
    """The step after which a checkpoint was saved, from its name; −1 for any other name."""
    found = re.fullmatch(r"checkpoint-(\d+)", Path(checkpoint).name)
    return int(found[1]) if found else -1


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def search_in(folder: Path) -> Path | None:
    """What an unfinished search of `--auto` left in `folder`; None if there is nothing."""
    found = folder / SEARCH
    return found if (found / SEARCHED).is_file() else None


def fault_of(checkpoint: Path) -> str | None:
    """What is missing or broken in a checkpoint; None for a whole one. Reads all of it."""
    checks: dict[str, Callable[[Path], str | None]] = {
        TRAINER_STATE: _trainer_state,
        STATE: _tensors,
        "optimizer.pt": _archive,
        "scheduler.pt": _archive,
    }
    random_states = sorted(path.name for path in checkpoint.glob("rng_state*.pth")) or ["rng_state.pth"]
    checks |= dict.fromkeys(random_states, _archive)
    checks |= {name: own for name, own in _SOMETIMES.items() if (checkpoint / name).exists()}
    for name, check in checks.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if (fault := check(path)) is not None:
            return f"{name} {fault}"
    return None


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder, and a sentence for each newer one that is passed over."""
    passed: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint, passed
        passed.append(f"{checkpoint.name} is not whole and is passed over: {fault}.")
    return None, passed


def history_in(checkpoint: Path) -> list[dict[str, Any]]:
    """What a run had logged by then."""
    history: list[dict[str, Any]] = json.loads((checkpoint / TRAINER_STATE).read_text(encoding="utf-8"))["log_history"]
    return history


def record_in(checkpoint: Path) -> dict[str, Any] | None:
    """The record of the run that a checkpoint belongs to; None where lorakit 0.1.0 wrote it."""
    path = checkpoint / RUN
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _trainer_state(path: Path) -> str | None:
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError):
        return "is cut off"
    named = step_of(path.parent)
    return f"is of step {step}" if named >= 0 and step != named else None


def _tensors(path: Path) -> str | None:
    try:
        with safe_open(path, framework="pt"):
            return None
    except (safetensors.SafetensorError, OSError):
        return "is cut off"


def _archive(path: Path) -> str | None:
    """What is wrong with a file of torch.save: a zip file, whose directory is at its end. None if nothing is."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError):
        return "is cut off"
    return None if damaged is None else "is damaged"


_SOMETIMES = {"scaler.pt": _archive, BEST: _tensors}  # files that only some runs have
