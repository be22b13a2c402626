"""Show the progress of runs: on a terminal a bar of runs and a bar of the run's steps, in a log a line for each run.

Both say how long the runs take that are still to be made, from the first steps of the first run on. Everything goes to
standard error.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from ...training.bars import Bar, progress_bar
from ...training.pace import StepTimes
from ...training.terminal import is_watched
from .results import Run
from .time_left import RunSeconds, TimeLeft

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's, without its own estimate


class RunsProgress:
    """Two bars on a terminal; otherwise a line for each finished run."""

    def __init__(self) -> None:
        self._runs: Bar | None = None
        self._steps: Bar | None = None
        self._left: TimeLeft | None = None
        self._first: _FirstSteps | None = None  # of a run of a method that no run is known of
        self.made = 0  # runs
        self._silent = not is_watched()

    def __enter__(self) -> RunsProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for bar in (self._steps, self._runs):
            if bar is not None:
                bar.close()

    def begin(self, left: TimeLeft) -> None:
        """left: what is to be made. A search may end early; the bar then moves over the runs that are not needed."""
        self._left = left
        if left.runs():
            self._runs = progress_bar(total=left.runs(), doing="runs", unit="run", leave=True)
            self._runs.bar_format = _BAR
            self._runs.set_postfix_str(left.told())

    def run(self, task: str, method: str, seed: int, rate: float, steps: int) -> None:
        """Show that a run begins."""
        self._close_steps()
        self._first = None
        if self._left is not None and not self._left.knows(task, method):
            self._first = _FirstSteps(task, method)
        label = f"{task}: {method}, rate {rate:g}, seed {seed}"
        self._steps = progress_bar(total=steps, doing=label, unit="step")

    def step(self) -> None:
        if self._steps is not None:
            self._steps.update()
        if self._left is None or self._first is None:
            return
        cost = self._first.step()
        if cost is None:
            return
        task, method = self._first.task, self._first.method
        self._first = None
        self._left.begun(task, method, cost)
        told = self._left.told()
        if self._runs is not None:
            self._runs.set_postfix_str(told)
        if self._silent:
            print(f"{task}: {method}: {told}, this one included", file=sys.stderr)

    def says(self, what: str) -> None:
        """Show what the run does after its last step."""
        if self._steps is not None:
            self._steps.set_postfix_str(what)

    def finished(self, run: Run) -> None:
        """Show what a run came to; the ledger holds it."""
        self.made += 1
        self._close_steps()
        told = ""
        if self._left is not None:
            self._left.finished(run)
            told = self._left.told()
            if self._runs is not None:
                self._runs.update(self._runs.total - self._left.runs() - self._runs.n)
                self._runs.set_postfix_str(told)
        if self._silent:
            scores = ", ".join(f"{name} {score:.2f}" for name, score in (run.test or run.valid).items())
            where = "test" if run.test else "validation"
            said = "diverged" if run.diverged else f"{where}: {scores}"
            print(
                f"{run.task}: {run.method}, rate {run.learning_rate:g}, seed {run.seed}: {said}; {run.seconds:.0f} s"
                + (f"; {told}" if told else ""),
                file=sys.stderr,  # standard output is the table's
            )

    def _close_steps(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None


class _FirstSteps:
    """The cost of a run, by its first steps: those that are timed, and all that comes before the end of the first."""

    def __init__(self, task: str, method: str) -> None:
        self.task, self.method = task, method
        self._times = StepTimes()
        self._began = time.perf_counter()
        self._before: float | None = None

    def step(self) -> RunSeconds | None:
        """A step is over. None while too little is timed."""
        if self._before is None:
            self._before = time.perf_counter() - self._began
        self._times.ends()
        self._times.begins()
        return RunSeconds(self._times.mean, self._before) if self._times.enough else None
