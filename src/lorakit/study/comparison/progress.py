"""Show the progress of runs: on a terminal a bar of runs and a bar of the run's steps, in a log a line for each run.

Everything goes to standard error.
"""

from __future__ import annotations

import sys
from types import TracebackType

from ...training.bars import Bar, progress_bar
from ...training.terminal import is_watched
from .results import Run


class RunsProgress:
    """Two bars on a terminal; otherwise a line for each finished run."""

    def __init__(self) -> None:
        self._runs: Bar | None = None
        self._steps: Bar | None = None
        self._expected = 0  # where the bar should be when the current method is done
        self.made = 0  # runs
        self._silent = not is_watched()

    def __enter__(self) -> RunsProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for bar in (self._steps, self._runs):
            if bar is not None:
                bar.close()

    def begin(self, most: int) -> None:
        """most: the number of runs if every search takes all its trials; the bar skips runs that are not needed."""
        self._runs = progress_bar(total=most, doing="runs", unit="run", leave=True)

    def run(self, task: str, method: str, seed: int, rate: float, steps: int) -> None:
        """Show that a run begins."""
        self._close_steps()
        label = f"{task}: {method}, rate {rate:g}, seed {seed}"
        self._steps = progress_bar(total=steps, doing=label, unit="step")

    def step(self) -> None:
        if self._steps is not None:
            self._steps.update()

    def says(self, what: str) -> None:
        """Show what the run does after its last step."""
        if self._steps is not None:
            self._steps.set_postfix_str(what)

    def finished(self, run: Run) -> None:
        self.made += 1
        self._close_steps()
        if self._runs is not None:
            self._runs.update()
        if self._silent:
            scores = ", ".join(f"{name} {score:.2f}" for name, score in (run.test or run.valid).items())
            where = "test" if run.test else "validation"
            said = "diverged" if run.diverged else f"{where}: {scores}"
            print(
                f"{run.task}: {run.method}, rate {run.learning_rate:g}, seed {run.seed}: {said}; {run.seconds:.0f} s",
                file=sys.stderr,  # standard output is the table's
            )

    def advance_to_method_end(self, runs: int) -> None:
        """Move the bar over the runs of this method that were not needed."""
        self._expected += runs
        if self._runs is not None:
            self._runs.update(self._expected - self._runs.n)

    def _close_steps(self) -> None:
        if self._steps is not None:
            self._steps.close()
            self._steps = None
