"""The root of lorakit's own errors. Imports nothing heavy."""

from __future__ import annotations


class LoraError(ValueError):
    """The input cannot be what was meant. The message says what was given, where, and what to do next.

    It is a ValueError, so programs that catch ValueError keep working. System errors stay OSErrors.
    """
