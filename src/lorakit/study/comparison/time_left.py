"""How many runs a comparison still makes at most, and how long they take.

    seconds of a run = steps · (seconds of training / steps) + all other seconds        each a mean over finished runs

The finished runs are those of the same method on the same task, with the same settings. The first run of a method is
estimated by its own first steps (`training/pace.py`), and before these by the mean of the other methods on its task:
that is rough, since one may take twice as long as another. Of a task without a run only the number of runs is told.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...core.numbers import duration
from ...training.ladder import best_tried
from ..methods.naming import name_of
from .config import MethodConfig
from .fit import steps_of
from .plan import TaskPlan, run_key
from .results import Ledger, Run
from .search import next_rate


@dataclass(frozen=True)
class RunSeconds:
    """Of a run: seconds of a step, and of all else."""

    step: float
    other: float


class TimeLeft:
    """What is still to be made for the plans, when the ledger holds the finished runs."""

    def __init__(self, plans: Sequence[TaskPlan], seeds: int, trials: int, ledger: Ledger) -> None:
        self._plans, self._seeds, self._trials, self._ledger = plans, seeds, trials, ledger
        self._made: set[str] = set()  # keys of runs of this process; of the best one of a search the weights are kept
        self._begun: dict[tuple[str, str], RunSeconds] = {}  # by task and method, from the first steps of a run
        self.most = sum(self._left(plan, method, _nothing) for plan in plans for method in plan.methods)

    def runs(self) -> int:
        """The most runs that are still to be made: a search may end before all its trials."""
        return sum(self._left(plan, method, self._ledger.get) for plan in self._plans for method in plan.methods)

    def seconds(self) -> tuple[float, int]:
        """The seconds of these runs, and how many runs are left out of them, because their task has no known one."""
        seconds, unknown = 0.0, 0
        for plan in self._plans:
            costs = {name_of(method.method): self._cost(plan, method) for method in plan.methods}
            known = [cost for cost in costs.values() if cost is not None]
            for method in plan.methods:
                runs = self._left(plan, method, self._ledger.get)
                if not known:
                    unknown += runs
                    continue
                usual = RunSeconds(
                    *(statistics.mean(getattr(cost, part) for cost in known) for part in ("step", "other"))
                )
                cost = costs[name_of(method.method)] or usual
                seconds += runs * (steps_of(plan.task, method.training) * cost.step + cost.other)
        return seconds, unknown

    def told(self) -> str:
        """How many runs are left and how long they take, as far as that is known; "" if none is left."""
        runs, (seconds, unknown) = self.runs(), self.seconds()
        if not runs:
            return ""
        told = f"at most {runs} more run{'s' if runs > 1 else ''}"
        if unknown == runs:
            return told
        about = f"about {duration(seconds)}"
        if not unknown:
            return f"{told}, {about}"
        return f"{told}; {runs - unknown} of them: {about}, the others not timed yet"

    def finished(self, run: Run) -> None:
        """A run was made; the ledger holds it."""
        self._made.add(run.key)

    def knows(self, task: str, method: str) -> bool:
        """Whether a run of this method on this task was timed."""
        return any(
            self._cost(plan, own) is not None
            for plan in self._plans
            for own in plan.methods
            if (plan.task.name, name_of(own.method)) == (task, method)
        )

    def begun(self, task: str, method: str, cost: RunSeconds) -> None:
        """What the first steps of a run tell of its cost."""
        self._begun[task, method] = cost

    def _cost(self, plan: TaskPlan, method: MethodConfig) -> RunSeconds | None:
        names = plan.task.name, name_of(method.method)
        runs = [
            run
            for run in self._ledger
            if (run.task, run.method) == names
            and run.steps
            and run.key == run_key(plan.task, method, run.seed, run.learning_rate)
        ]
        if not runs:
            return self._begun.get(names)
        return RunSeconds(
            statistics.mean(run.seconds / run.steps for run in runs), statistics.mean(run.other_seconds for run in runs)
        )

    def _left(self, plan: TaskPlan, method: MethodConfig, get: Callable[[str], Run | None]) -> int:
        """The most runs that this method still needs on this task. The best run of the search is that of seed 0."""
        if plan.costs[name_of(method.method)].left_out:
            return 0
        rate = method.training.learning_rate
        if rate is None:
            tried: dict[float, float | None] = {}
            while (trial := next_rate(method.method, tried, self._trials)) is not None:
                run = get(run_key(plan.task, method, 0, trial))
                if run is None:
                    return self._trials - len(tried) + self._seeds - 1
                tried[trial] = None if run.diverged else run.valid[plan.task.chosen_by]
            rate = best_tried(tried) or min(tried)
        runs = [get(run_key(plan.task, method, seed, rate)) for seed in range(self._seeds)]
        return sum(not (run and (run.test or run.diverged or run.key in self._made)) for run in runs)


def _nothing(key: str) -> None:
    """The run of this key in a ledger that holds none."""
