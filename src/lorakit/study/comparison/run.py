"""Make the runs of a comparison: for each task and method, search a learning rate, then run every seed with the best.

Each finished run is a line of runs.jsonl, and a run that is there is not made again. An interrupted comparison
therefore continues where it was, and one with more seeds or methods makes only the new runs.

The search's best run is also the run of seed 0. Its weights are kept in a file until the search is over, so that it is
not trained twice, and so that no answers are generated for the other runs of the search.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...core.errors import LoraError
from ...core.reading import json_of
from ...formats.files import replacing
from ...formats.folder import HIDDEN
from ...training.ladder import best_tried
from ...training.memory import few_kernels
from ...training.quiet import quiet_libraries
from ..machine import machine, release
from ..methods.naming import name_of
from .config import MethodConfig
from .fit import steps_of
from .one_run import NotApplicable, make_run, score_kept
from .passes import Passes
from .plan import DECIDES, TaskPlan, run_key
from .progress import RunsProgress
from .results import Comparison, Ledger, MethodRow, Run, TaskFacts, row_of
from .runner import Order, Runner, ThisProcess
from .search import next_rate, next_rates
from .tasks import StudyTask
from .time_left import TimeLeft

RUNS, MACHINE = "runs.jsonl", "machine.json"


@quiet_libraries()
@few_kernels()
def compare(
    model: str,
    plans: Sequence[TaskPlan],
    folder: Path,
    *,
    seeds: int,
    trials: int,
    so_far: bool = False,
    progress: RunsProgress | None = None,
    runner: Runner | None = None,
    one_pass: bool = False,
) -> Comparison:
    """Make the runs that `folder` does not hold yet, and return the results of all of them.

    so_far: make no runs, and return the results of those in the folder. runner: where runs are made; None: in this
    process, whose peak memory then includes what earlier runs left. one_pass: train several runs of LoRA at once, where
    each is the same as alone; their time and memory are then shared. Raises ValueError if no method can be applied.
    """
    runner = None if so_far else runner or ThisProcess()
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / RUNS)
    progress = progress or RunsProgress()
    if runner is not None:
        progress.begin(TimeLeft(plans, seeds, trials, ledger))
    rows: list[MethodRow] = []
    left_out: list[tuple[str, str, str]] = []
    finished = True
    with progress, _scratch(folder) as scratch:
        for plan in plans:
            passes = Passes(plan.task, scratch) if one_pass and runner is not None else None
            for method in plan.methods:
                name = name_of(method.method)
                if reason := plan.costs[name].left_out:  # no process has to start to find it
                    left_out.append((plan.task.name, name, reason))
                    continue
                runs = _Runs(plan.task, method, ledger, progress, runner, scratch / "weights", passes)
                try:
                    rows.append(runs.of_all_seeds(seeds, trials))
                except NotApplicable as error:  # for a reason that the weights alone tell
                    left_out.append((plan.task.name, name, str(error)))
                except _NotMade:
                    pass
                finished = finished and runs.complete
    if left_out and not rows and finished:
        raise LoraError("no method can be applied. {}: {}: {}".format(*left_out[0]))
    return Comparison(
        model=model,
        tasks=tuple(_facts(plan) for plan in plans),
        rows=tuple(rows),
        left_out=tuple(left_out),
        seeds=tuple(range(seeds)),
        trials=trials,
        machine=_made_on(folder, progress.made > 0),
        finished=finished,
    )


class _NotMade(Exception):
    """A run that is needed is not in the ledger, and no runs are to be made."""


class _Runs:
    """The runs of one method on one task. so_far: only those of the ledger."""

    def __init__(
        self,
        task: StudyTask,
        config: MethodConfig,
        ledger: Ledger,
        progress: RunsProgress,
        runner: Runner | None,
        weights: Path,
        passes: Passes | None,
    ) -> None:
        """runner: where runs are made; None: only those of the ledger. weights: a file for what a best run trained.

        passes: trains several runs at once; None: each is trained alone.
        """
        self.task, self.config, self.ledger, self.progress = task, config, ledger, progress
        self.runner, self.weights, self.passes = runner, weights, passes
        self.complete = True
        self.name = name_of(config.method)
        self._tried: dict[float, float | None] = {}  # in the search: rate → score, None if it diverged
        self._best: Order | None = None  # of the best new run of the search, whose weights are in the file

    def of_all_seeds(self, seeds: int, trials: int) -> MethodRow:
        rate = self.config.training.learning_rate
        searched: list[Run] = []
        if rate is None:
            rate, searched = self._search(trials)
        runs = []
        for seed in range(seeds):
            with contextlib.suppress(_NotMade):
                runs.append(self._tested(seed, rate, range(seed + 1, seeds)))
        if not runs:
            raise _NotMade
        return row_of(runs, searched, self.task.chosen_by)

    def _search(self, trials: int) -> tuple[float, list[Run]]:
        """The best learning rate, and the runs of the search. If every run diverged, the lowest rate."""
        runs = []
        while (rate := next_rate(self.config.method, self._tried, trials)) is not None:
            order = dataclasses.replace(self._order(0, rate), rivals=dict(self._tried))
            known = self.ledger.get(order.key)
            run = known or self._made(order, next_rates(self.config.method, self._tried, trials)[1:])
            runs.append(run)
            self._tried[rate] = None if run.diverged else run.valid[self.task.chosen_by]
            if best_tried(self._tried) == rate:
                self._best = None if known else order
        return best_tried(self._tried) or min(self._tried), runs

    def _tested(self, seed: int, rate: float, later: Sequence[int]) -> Run:
        order = self._order(seed, rate)
        best, self._best = self._best, None  # the search is over: its weights are kept only for the first seed
        run = self.ledger.get(order.key)
        if run is not None and (run.test or run.diverged):
            return run
        if run is not None and best is not None and best.key == order.key:
            return self._with_test(run, order)
        return self._made(order, seeds=later)

    def _made(self, order: Order, rates: Sequence[float] = (), seeds: Sequence[int] = ()) -> Run:
        """Make the run and add it to the ledger. rates, seeds: of runs that are wanted next."""
        runner = self._needed_runner()
        if self.passes is not None:
            wanted = [self._order(order.seed, rate) for rate in rates]
            wanted += [self._order(seed, order.learning_rate) for seed in seeds]
            wanted = [own for own in wanted if self.ledger.get(own.key) is None]
            order = self.passes.trained(order, wanted, runner, self.progress)
        self.progress.run(
            self.task.name, self.name, order.seed, order.learning_rate, steps_of(self.task, self.config.training)
        )
        began = time.perf_counter()
        made = runner.do(make_run, self.task, order, self.progress)
        other = time.perf_counter() - began - made.seconds
        run = dataclasses.replace(made, alone=runner.alone, other_seconds=other)
        self.ledger.add(run)
        self.progress.finished(run)
        return run

    def _with_test(self, run: Run, order: Order) -> Run:
        """The best run of the search with its scores on the test rows, from the weights that were kept."""
        began = time.perf_counter()
        scores = self._needed_runner().do(score_kept, self.task, order, self.progress)
        other = run.other_seconds + time.perf_counter() - began
        tested = dataclasses.replace(run, test=scores, other_seconds=other)
        self.ledger.add(tested)
        return tested

    def _needed_runner(self) -> Runner:
        if self.runner is None:
            self.complete = False
            raise _NotMade
        return self.runner

    def _order(self, seed: int, rate: float) -> Order:
        return Order(run_key(self.task, self.config, seed, rate), self.config, seed, rate, self.weights)


@contextlib.contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A hidden folder for the time of the comparison; what an earlier one left there when it was killed is removed."""
    path = folder / HIDDEN / "runs"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # it holds something else
            path.parent.rmdir()


def _made_on(folder: Path, now: bool) -> dict[str, str]:
    """The machine of the last runs, from a file in the folder, because tables may be made later on another machine."""
    path = folder / MACHINE
    if now or not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({**machine(), "lorakit": release()}, indent=1) + "\n", encoding="utf-8")
    return json_of(path, dict)


def _facts(plan: TaskPlan) -> TaskFacts:
    task = plan.task
    trainings = [method.training for method in plan.methods]
    shared = {
        name: getattr(trainings[0], name)
        for name in DECIDES
        if len({getattr(training, name) for training in trainings}) == 1 and getattr(trainings[0], name)
    }
    steps = {steps_of(task, training) for training in trainings}
    if len(steps) == 1:
        shared["steps"] = steps.pop()
    return TaskFacts(
        name=task.name,
        source=task.source,
        kind=task.kind,
        rows=dict(task.rows),
        metrics=task.metrics,
        chosen_by=task.chosen_by,
        training=shared,
        published={label: dict(scores) for label, scores in plan.published.items()},
    )
