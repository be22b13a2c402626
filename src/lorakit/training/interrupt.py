"""Ctrl-C and a scheduler's SIGTERM while training: the step in hand is finished, saved, and the run ends.

A second one ends it at once. With several processes it ends at once too: they would have to agree on a step first.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from .plan import processes


class Interrupted(KeyboardInterrupt):
    """The end of a run that was interrupted, and what to do next. code: the exit code of the program."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


class SaveAndStop(TrainerCallback):
    """Ends a training after the step in which a signal came, with a checkpoint."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Inside, signals are heeded as above. Python lets the main thread alone do so."""
        if processes() > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted("", 128 + number)
        self.signal = number
        print("\nfinishing and saving this step; once more stops at once", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # At the end of an epoch the held-out loss comes first, as it does in a run that is not interrupted: drawing
        # its batches moves the random numbers on.
        if self.signal is not None and state.global_step < state.max_steps and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal is not None:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal is not None:
            raise Interrupted("", 128 + self.signal)
