"""Show the progress of training as a bar or as lines, and write one line for each logged step to metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..core.numbers import duration
from ..formats.files import naming, replacing
from .bars import Bar, progress_bar
from .memory import forget_peak, peak_memory
from .outcome import logged_lines
from .pace import Pace
from .scores import METRICS, logged_as

_TOLD = 10.0  # seconds: a shorter rest of a run is not announced


class Progress(TrainerCallback):
    """A bar during training, and one line for each logged step in metrics.jsonl.

    Without a bar, the remaining time that `pace` estimates is printed once.
    """

    def __init__(self, folder: Path, pace: Pace | None = None) -> None:
        self.path = folder / "metrics.jsonl"
        self._pace = pace  # None once the remaining time is known
        self.history: list[dict[str, float]] = []
        self.seconds = 0.0
        self.loading_bytes = 0  # the peak before training began
        self.peak_bytes = 0  # the peak of training alone, if the system can tell the two apart
        self._bar: Bar | None = None
        self._began = 0.0

    def take(self, step: int) -> None:
        """Read the lines of a run that has nothing left to train."""
        self.history = _read_lines(self.path, up_to=step)

    def become(self, lines: list[dict[str, float]]) -> None:
        """Take these lines in the place of all that there are."""
        self.history = lines
        with replacing(self.path) as path:
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    def note(self, line: dict[str, float]) -> None:
        """Add a line that is no step of the training."""
        self.history.append(line)
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.loading_bytes = peak_memory(args.device)
        forget_peak(args.device)
        self._began = time.perf_counter()
        if not state.is_world_process_zero:
            return
        self.become(_read_lines(self.path, up_to=state.global_step))
        self._bar = progress_bar(
            total=state.max_steps, initial=state.global_step, doing="training", unit="step", leave=True
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._pace is not None:
            self._pace.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        if self._pace is not None:
            self._pace.step_ends()
            self._tell_the_rest(self._pace, args, state)

    def _tell_the_rest(self, pace: Pace, args: Any, state: Any) -> None:
        steps, losses = state.max_steps - state.global_step, _heldout_losses(args, state)
        seconds = pace.rest(steps, losses)
        if seconds is None:
            return
        self._pace = None
        if self._bar is not None and self._bar.disable and seconds >= _TOLD:
            also = " and their held-out losses" if losses else ""
            print(f"about {duration(seconds)} for the remaining {steps} steps{also}", flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return
        line = {"step": state.global_step, **{key: _rounded(value) for key, value in logs.items() if _is_number(value)}}
        line["seconds"] = round(time.perf_counter() - self._began, 2)
        self.note(line)
        self._show(line, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seconds = time.perf_counter() - self._began
        self.peak_bytes = peak_memory(args.device)
        if self._bar is not None:
            self._bar.close()

    def _show(self, line: dict[str, float], steps: int) -> None:
        if self._bar is None:
            return
        if not self._bar.disable:
            self._bar.set_postfix(_newest_losses(self.history), refresh=True)
        elif "loss" in line:
            print(f"step {line['step']}/{steps}  loss {line['loss']:.4f}  {line['seconds']:.0f} s", flush=True)
        elif "eval_loss" in line:
            scores = {name: line[logged_as(name)] for name in METRICS if logged_as(name) in line}
            also = "".join(f", {name} {value:.4g}" for name, value in scores.items())
            print(f"step {line['step']}/{steps}  held-out loss {line['eval_loss']:.4f}{also}", flush=True)


def _heldout_losses(args: Any, state: Any) -> int:
    """How many held-out losses are still to be computed, including one that is due now."""
    if args.eval_strategy == "epoch":
        begun = math.ceil((state.epoch or 0) - 1e-6)  # epochs, including the current one
        return int(state.num_train_epochs - begun + 1)
    if args.eval_strategy == "steps":
        return int(state.max_steps // args.eval_steps - (state.global_step - 1) // args.eval_steps)
    return 0


def _newest_losses(history: list[dict[str, float]]) -> dict[str, float]:
    """The newest training loss and the newest held-out loss."""
    newest: dict[str, float] = {}
    for line in history:
        newest |= {key: line[key] for key in ("loss", "eval_loss") if key in line}
    return newest


def _read_lines(path: Path, up_to: int) -> list[dict[str, float]]:
    """The lines of an interrupted run that a resumed one continues."""
    return [line for line in logged_lines(path) if line["step"] <= up_to] if up_to else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
