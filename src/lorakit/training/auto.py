"""`lorakit train --auto 30m`: search the learning rate and the rank by the held-out loss, within a budget.

The walk is that of `ladder.py`: first the learning rate at the rank that the run begins with, then the rank, then the
rate again if the rank has moved. What is tried next is trained in one pass, as by `--sweep`.

A budget of runs is spent on whole runs, and the best of them is the result. A budget of time is compared with the time
that a run takes, which some timed steps tell. If the first passes over both axes fit as whole runs, all are whole runs.
If not, the search trains on a share of the steps, with the whole schedule in them, and then the best setting is trained
again on all of them; the time for that is set aside first. A pass that does not fit in what is left is not begun.

A schedule that is cut off would compare rates before they have fallen, and prefer low ones. One that is compressed ends
as the whole one does. It still prefers rates that are a little higher, because there are fewer steps to get anywhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..core.errors import LoraError
from ..core.numbers import duration
from .auto_settings import AutoSearch, Candidate
from .divergence import Diverged
from .ladder import best_tried, untried
from .tried import Trial

_SHARES = (0.5, 0.25, 0.125)  # of the steps of a run, on which the search may train

# Trains candidates in one pass, on this share of the steps.
Train = Callable[[Sequence[Candidate], float], Mapping[Candidate, Trial]]


class Purse(Protocol):
    """What is left of a budget. share: of the steps of a run, on which the search trains."""

    share: float

    def holds(self, count: int) -> bool:
        """Whether so many candidates can be trained in one pass, and the last run after them."""
        ...

    def pays(self, count: int, whole: bool) -> None:
        """Note that so many were trained in one pass of the search. whole: to its end."""
        ...

    def spent(self) -> str: ...


class Runs:
    """A number of whole runs."""

    share = 1.0

    def __init__(self, runs: int, made: int = 0) -> None:
        """made: those of an interrupted search that this one goes on with."""
        self._runs, self._made = runs, made

    def holds(self, count: int) -> bool:
        return self._made + count <= self._runs

    def pays(self, count: int, whole: bool) -> None:
        self._made += count

    def spent(self) -> str:
        return f"{self._made} of {self._runs} runs"


class Seconds:
    """A time, which begins now. A pass is expected to take what the last one of as many adapters took.

    Until there was one, so many adapters take so many times as long as one. This is an upper limit: they share the
    products of the base.
    """

    def __init__(self, seconds: float, taken: float = 0.0) -> None:
        """taken: what an interrupted search took, that this one goes on with."""
        self.share = 1.0
        self._seconds = seconds
        self._before = time.perf_counter()
        self._began = self._before - taken
        self._cost: dict[int, float] = {}  # of a pass on all steps, by the number of adapters

    def plan(self, run: float, passes: int, share: float | None = None, made: bool = False) -> None:
        """Choose on which share of the steps the search trains.

        run: the seconds that a run takes alone. passes: how many runs the first passes over all axes are. share: that
        of an interrupted search, which stays. made: whether there is a run on all steps already. Raises LoraError if
        there is none, and none fits.
        """
        self._before = time.perf_counter()
        self._cost = {1: run}
        left = self._seconds - self.taken()
        if run > left and not made:
            raise LoraError(
                f"--auto: one run takes about {duration(run)} here, and {duration(max(left, 0))} of "
                f"{duration(self._seconds)} are left. A search needs about {duration(passes * run)}, or "
                f"{duration((1 + _SHARES[-1] * passes) * run)} if it trains on fewer steps. Give more time, or shorten "
                "the run with --max-steps or --epochs."
            )
        shorter = (share for share in _SHARES if (1 + share * passes) * run <= left)
        self.share = share or (1.0 if passes * run <= left else next(shorter, _SHARES[-1]))

    def holds(self, count: int) -> bool:
        last = 0.0 if self.share == 1 else self._cost[1]
        cost = self._cost.get(count, count * self._cost[1])
        return self.taken() + cost * self.share + last <= self._seconds

    def pays(self, count: int, whole: bool) -> None:
        now = time.perf_counter()
        if whole:
            self._cost[count] = (now - self._before) / self.share
        self._before = now

    def spent(self) -> str:
        return f"{duration(self.taken())} of {duration(self._seconds)}"

    def taken(self) -> float:
        return time.perf_counter() - self._began


def best_within(
    search: AutoSearch, purse: Purse, train: Train, before: Mapping[tuple[Candidate, float], Trial] | None = None
) -> tuple[Candidate, str]:
    """The best candidate, which was trained on all steps; and why the search ended.

    before: what an interrupted search tried, by the share of the steps too. Raises Diverged if no candidate has a
    finite loss.
    """
    before = before or {}
    tried = {candidate: _score(trial) for (candidate, share), trial in before.items() if share == purse.share}
    ended = "no neighbour of the best setting is better"
    while points := untried(tried, search.start, search.moves):
        most = min(len(points), search.at_once)
        count = next((count for count in range(most, 0, -1) if purse.holds(count)), 0)
        if not tried and not purse.holds(2):
            ended = "the budget holds nothing but the run itself"
            break
        if not count:
            ended = "the budget holds no further run"
            break
        trials = train(points[:count], purse.share)
        tried |= {candidate: _score(trial) for candidate, trial in trials.items()}
        purse.pays(count, whole=any(tried[candidate] is not None for candidate in trials))
    best = best_tried(tried) if tried else search.start
    if best is None:
        rates = [candidate.learning_rate for candidate in tried]
        raise Diverged(
            f"--auto: all {len(tried)} runs diverged, with learning rates from {min(rates):g} to {max(rates):g}. A run "
            "with one of them, without --auto, says at which rows."
        )
    whole = before.get((best, 1.0))
    if whole is None and (purse.share < 1 or not tried):
        whole = train([best], 1.0)[best]
    if whole is not None and _score(whole) is None:
        raise Diverged(f"--auto: the run with the best setting, {search.name(best)}, diverged on all steps.")
    return best, ended


def _score(trial: Trial) -> float | None:
    return trial.score if math.isfinite(trial.score) else None
