"""The root of lorakit's own errors, and where an error was raised. Imports nothing heavy."""

from __future__ import annotations

import traceback


class LoraError(ValueError):
    """The input cannot be what was meant. The message says what was given, where, and what to do next.

    It is a ValueError, so programs that catch ValueError keep working. System errors stay OSErrors.
    """


class RaisedElsewhere(Exception):
    """The cause of an error that was raised in another process: its traceback there, as text.

    module: the name of the module that raised it.
    """

    def __init__(self, text: str, module: str) -> None:
        super().__init__(text, module)
        self.text, self.module = text, module

    def __str__(self) -> str:
        return f"\n{self.text.rstrip()}"

    @classmethod
    def of(cls, error: BaseException) -> RaisedElsewhere:
        return cls("".join(traceback.format_exception(error)), module_that_raised(error))


def module_that_raised(error: BaseException) -> str:
    """The name of the module in whose code an error was raised, also in another process; "" if that is not known."""
    if isinstance(error.__cause__, RaisedElsewhere):
        return error.__cause__.module
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
