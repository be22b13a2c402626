"""Turn any failure into one message without a traceback, and an exit code."""

from __future__ import annotations

import sys
import traceback

from ..core.errors import module_that_raised
from ..core.words import first_line
from ..training.settings import UsageError

_SCORES = ("sacrebleu", "rouge_score", "sklearn", "scipy")


def report(error: BaseException, verb: str, *, debug: bool) -> int:
    """Print what went wrong with `lorakit VERB` and return the exit code.

    The code is 2 for a usage error, the error's own code (130 without one) for an interrupt, and 1 for the rest.
    """
    if debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error)
    elif isinstance(error, KeyboardInterrupt):
        print(f"\n{str(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "code", 130)  # `Interrupted` has 143 if a scheduler ended the run
    elif isinstance(error, UsageError):
        print(f"lorakit {verb}".rstrip() + f": {error}", file=sys.stderr)
    else:
        print(f"error: {_message(error)}", file=sys.stderr)
    return 2 if isinstance(error, UsageError) else 1


def _message(error: BaseException) -> str:
    if isinstance(error, ImportError) and not str(error.name or "").startswith("lorakit"):
        if str(error.name).partition(".")[0] in _SCORES:
            return f'{error}. Scores need more packages: pip install "lorakit[study]"'
        return f'{error}. Training needs more packages: pip install "lorakit[train]"'
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file or folder."
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{error.strerror.lower()}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        reason = first_line(error) or type(error).__name__
        return f"out of memory ({reason}). Smaller batches and shorter rows need less."
    if isinstance(error, ValueError | OSError | FloatingPointError) and str(error):
        # lorakit's messages may have several lines. In other libraries' messages, later lines are links and versions.
        return str(error) if _is_ours(error) else f"{first_line(error)} (--debug shows where)"
    return f"{type(error).__name__}: {first_line(error)} (--debug shows where)"


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by lorakit rather than by a library underneath."""
    return module_that_raised(error).partition(".")[0] in ("lorakit", "")
