"""Estimate how long the rest of a run takes, from the run's own first steps.

Time is assumed proportional to tokens, including padding:

    rest = (seconds of timed steps / their tokens) · tokens of the steps to come
         + (seconds of timed forward passes / their tokens) · tokens of the held-out losses to come

Writing checkpoints is not counted. Nothing is estimated before training: the arithmetic of a step divided by the speed
of one product was off by a factor of 1.7.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence

_WARM = 2  # first steps that are not timed: they compile kernels and allocate memory
_TIMED = 3  # timed steps, at least
_SECONDS = 3.0  # seconds of timed steps, at least: less is too noisy


class StepTimes:
    """The seconds of a run's steps, without the first ones."""

    def __init__(self) -> None:
        self._steps = 0
        self._began = 0.0
        self.seconds = 0.0  # of the steps that count

    @property
    def warm(self) -> bool:
        """Whether the next step counts."""
        return self._steps >= _WARM

    @property
    def enough(self) -> bool:
        """Whether enough was timed to tell from it how long other steps take."""
        return self._steps >= _WARM + _TIMED and self.seconds >= _SECONDS

    @property
    def mean(self) -> float:
        """The mean of the steps that count, of which there must be one."""
        return self.seconds / (self._steps - _WARM)

    def begins(self) -> None:
        self._began = time.perf_counter()

    def ends(self) -> None:
        if self.warm:
            self.seconds += time.perf_counter() - self._began
        self._steps += 1


class Pace:
    """step_tokens: mean tokens of a step. heldout_tokens: tokens of one held-out loss. Both for one process."""

    def __init__(self, step_tokens: float, heldout_tokens: int) -> None:
        self._step_tokens, self._heldout_tokens = step_tokens, heldout_tokens
        self._times = StepTimes()
        self._tokens, self._forward = 0, 0.0

    @contextlib.contextmanager
    def forward(self, tokens: int) -> Iterator[None]:
        """Time the forward pass of a step, which is the block."""
        began = time.perf_counter()
        yield
        if self._times.warm:
            self._forward += time.perf_counter() - began
            self._tokens += tokens

    def step_begins(self) -> None:
        self._times.begins()

    def step_ends(self) -> None:
        self._times.ends()

    def rest(self, steps: int, heldout_losses: int) -> float | None:
        """The seconds that `steps` and `heldout_losses` take; None while too little was timed."""
        if not self._times.enough:
            return None
        training = self._times.seconds * self._step_tokens * steps
        return (training + self._forward * self._heldout_tokens * heldout_losses) / self._tokens


def padded_tokens(lengths: Sequence[int], batch_size: int, *, shuffled: bool) -> int:
    """The tokens of all batches, with each row padded to the longest of its batch. shuffled: in a random order."""
    rows = list(lengths)
    if shuffled:
        random.Random(0).shuffle(rows)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return sum(max(batch) * len(batch) for batch in batches)
