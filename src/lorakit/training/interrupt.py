"""Ctrl-C and a scheduler's SIGTERM during training: the current step is finished and saved, and the run ends.

A second signal ends the run at once. With several processes the first signal does, because they would have to agree on
a step.
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
    """Raised for an interrupted run; the message says what to do next. code: the exit code of the program."""

    def __init__(self, message: str, code: int = 130) -> None:
        super().__init__(message)
        self.code = code


class SaveAndStop(TrainerCallback):
    """Saves a checkpoint after the step in which a signal came, and ends the run."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextmanager
    def heeding(self) -> Iterator[None]:
        """Within the block, signals are handled as above. Python allows this only in the main thread."""
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
        # At the end of an epoch, `on_epoch_end` saves: the held-out loss comes first, as in a run without interruption,
        # because drawing its batches advances the random numbers.
        if self.signal is not None and state.global_step < state.max_steps and not float(state.epoch).is_integer():
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal is not None:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signal is not None:
            raise Interrupted("", 128 + self.signal)
