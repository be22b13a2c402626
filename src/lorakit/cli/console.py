"""Standard output and error that accept every character and survive the loss of their reader.

A console or a pipe may support fewer characters than are printed (Windows: cp1252, gbk; a bare container: ascii). Even
UTF-8 cannot encode half of a surrogate pair. The reader of a pipe may end before the work is done (`| head`). A process
may be started without any output. None of these may end a run.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Substitutes for the characters outside ASCII that lorakit prints. Others, from a user's rows, are escaped: \xe9.
_SUBSTITUTES = {
    "─": "-", "│": "|", "▲": "^", "▼": "v", "⟦": "[[", "⟧": "]]", "→": "->", "←": "<-", "×": "x", "·": "*", "…": "...",
    "±": "+/-", "−": "-", "–": "-", "—": "-", "‖": "||", "≤": "<=", "≥": ">=", "≈": "~", "≠": "!=", "∞": "inf",
    "✓": "v", "✗": "x", "★": "*", "•": "*", "“": '"', "”": '"', "‘": "'", "’": "'", "√": "sqrt", "²": "^2",
    "Δ": "D", "σ": "s", "α": "alpha", "⊙": "*", "ᵀ": "^T", "█": "#", "\u00a0": " ",
}  # fmt: skip
_ERRORS = "lorakit-substitutes"


def _substituted(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (c.encode("ascii", "backslashreplace").decode("ascii") for c in characters)
    return "".join(_SUBSTITUTES.get(c, other) for c, other in zip(characters, escaped, strict=True)), error.end


codecs.register_error(_ERRORS, _substituted)


class _Lasting:
    """A stream that discards what is written once its reader is gone. Other attributes are the wrapped stream's."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError as error:
            # The interpreter still flushes what is buffered when it ends; send that to the null device.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)
            # Windows reports a pipe without a reader as an invalid argument.
            if not isinstance(error, BrokenPipeError) and error.errno != errno.EINVAL:
                raise OSError(f"standard output: {(error.strerror or str(error)).lower()}.") from None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, sys.stdout and sys.stderr accept every character and survive the loss of their reader."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        sys.stdout, sys.stderr = (stack.enter_context(_made_to_last(stream)) for stream in before)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the block has flushed what it wanted to know of
                sys.stdout.flush()
                sys.stderr.flush()
            sys.stdout, sys.stderr = before


@contextlib.contextmanager
def _made_to_last(stream: TextIO | None) -> Iterator[Any]:
    if stream is None:  # the parent process closed it
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            yield nowhere
        return
    errors = getattr(stream, "errors", None)
    chosen = errors in ("strict", "surrogateescape", "backslashreplace")  # the user chose any other
    reconfigure = getattr(stream, "reconfigure", None) if chosen else None
    if reconfigure is not None:
        reconfigure(errors=_ERRORS)
    try:
        yield _Lasting(stream)
    finally:
        if reconfigure is not None:
            with contextlib.suppress(OSError):
                reconfigure(errors=errors)
