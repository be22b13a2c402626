"""The machine and the state of the source with which times were measured, for the tables of times."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

_ROOT = Path(__file__).resolve().parents[3]  # the repository, if lorakit runs from it


def machine() -> dict[str, str]:
    """The processor, the threads in use, and the versions that matter."""
    found = {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found = {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), **found}
    return found


def release() -> str:
    """lorakit's version and, if it runs from its repository, the commit."""
    at = commit()
    return f"{version('lorakit')} at {at}" if at else version("lorakit")


def commit() -> str | None:
    """The commit of the source, with "with changes" if the source differs from it. None outside the repository."""
    if not (_ROOT / ".git").exists():
        return None
    head = _git("rev-parse", "--short", "HEAD")
    # Only src counts, because results are written into the repository while they are made.
    return f"{head} with changes" if head and _git("status", "--porcelain", "src") else head


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *words], capture_output=True, text=True)
    except OSError:  # no git on this machine
        return None
    return done.stdout.strip() or None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
