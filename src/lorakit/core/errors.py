"""The root of lorakit's own errors. Imports nothing heavy."""

from __future__ import annotations


class LoraError(ValueError):
    """What was given cannot be what was meant: the message says what it was, where, and what to do next.

    A ValueError, so that programs which catch that keep working. Errors of the system (OSError) stay what they are.
    """
