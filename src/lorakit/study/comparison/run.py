"""Make the runs of a comparison: for each task and method, search a learning rate, then run every seed with the best.

Each finished run is a line of runs.jsonl, and a run that is there is not made again. An interrupted comparison
therefore continues where it was, and one with more seeds or methods makes only the new runs.

The search's best run is also the run of seed 0. Its weights are kept in memory until the search is over, so that it is
not trained twice, and so that no answers are generated for the other runs of the search.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...core.errors import LoraError
from ...core.reading import json_of
from ...formats.files import replacing
from ...training.ladder import best_tried
from ...training.memory import few_kernels
from ...training.quiet import quiet_libraries
from ..machine import machine, release
from ..methods.baselines import Applied, Method
from ..methods.naming import name_of
from .config import MethodConfig
from .fit import fit, steps_of
from .plan import TaskPlan, apply, most_runs, most_runs_of
from .progress import RunsProgress
from .results import Comparison, Ledger, MethodRow, Run, TaskFacts, row_of
from .search import next_rate
from .tasks import StudyTask, digest_of, halved, served

RUNS, MACHINE = "runs.jsonl", "machine.json"
_TURNS = 7  # timings of each of the two models, in alternation; the shortest of each counts
_DECIDES = (
    *("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "scheduler", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "label_smoothing", "gradient_checkpointing"),
)  # the training settings that change the result, besides the learning rate


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
) -> Comparison:
    """Make the runs that `folder` does not hold yet, and return the results of all of them.

    so_far: make no runs, and return the results of those in the folder. Raises ValueError if no method can be applied.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / RUNS)
    progress = progress or RunsProgress()
    progress.begin(most_runs_of(plans, seeds, trials))
    rows: list[MethodRow] = []
    left_out: list[tuple[str, str, str]] = []
    finished = True
    with progress:
        for plan in plans:
            for method in plan.methods:
                runs = _Runs(plan.task, method, ledger, progress, so_far)
                try:
                    rows.append(runs.of_all_seeds(seeds, trials))
                except _NotApplicable as reason:
                    left_out.append((plan.task.name, name_of(method.method), str(reason)))
                except _NotMade:
                    pass
                finished = finished and runs.complete
                progress.advance_to_method_end(most_runs(plan, method, seeds, trials))
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


class _NotApplicable(Exception):
    """Why the method cannot be applied to the model."""


class _NotMade(Exception):
    """A run that is needed is not in the ledger, and no runs are to be made."""


class _Runs:
    """The runs of one method on one task. so_far: only those of the ledger."""

    def __init__(
        self, task: StudyTask, config: MethodConfig, ledger: Ledger, progress: RunsProgress, so_far: bool
    ) -> None:
        self.task, self.config, self.ledger, self.progress, self.so_far = task, config, ledger, progress, so_far
        self.complete = True
        self.name = name_of(config.method)
        self._tried: dict[float, float | None] = {}  # in the search: rate → score, None if it diverged
        self._best: tuple[Run, dict[str, Tensor]] | None = None  # the search's best new run, and what it trained

    def of_all_seeds(self, seeds: int, trials: int) -> MethodRow:
        rate = self.config.training.learning_rate
        searched: list[Run] = []
        if rate is None:
            rate, searched = self._search(trials)
        runs = []
        for seed in range(seeds):
            with contextlib.suppress(_NotMade):
                runs.append(self._tested(seed, rate))
        if not runs:
            raise _NotMade
        return row_of(runs, searched, self.task.chosen_by)

    def _search(self, trials: int) -> tuple[float, list[Run]]:
        """The best learning rate, and the runs of the search. If every run diverged, the lowest rate."""
        runs = []
        while (rate := next_rate(self.config.method, self._tried, trials)) is not None:
            key = self._key(0, rate)
            run = self.ledger.get(key) or self._made(key, 0, rate, test=False)
            runs.append(run)
            self._tried[rate] = None if run.diverged else run.valid[self.task.chosen_by]
        return best_tried(self._tried) or min(self._tried), runs

    def _tested(self, seed: int, rate: float) -> Run:
        key = self._key(seed, rate)
        best, self._best = self._best, None  # the search is over: its weights are kept only for the first seed
        run = self.ledger.get(key)
        if run is not None and (run.test or run.diverged):
            return run
        if run is not None and best is not None and best[0].key == key:
            run = self._with_test(*best)
            self.ledger.add(run)
            return run
        return self._made(key, seed, rate, test=True)

    def _made(self, key: str, seed: int, rate: float, *, test: bool) -> Run:
        """Train, score, measure the latency, and add the run to the ledger."""
        if self.so_far:
            self.complete = False
            raise _NotMade
        training = self.config.training
        self.progress.run(self.task.name, self.name, seed, rate, steps_of(self.task, training))
        model, applied = self._applied(seed)
        fitted = fit(applied, self.task, training, seed=seed, learning_rate=rate, step=self.progress.step)
        diverged = fitted.diverged
        valid: dict[str, float] = {}
        scores: dict[str, float] = {}
        if not diverged:
            self.progress.says("validation")
            valid = self.task.validate(applied)
            if not math.isfinite(
                valid[self.task.chosen_by]
            ):  # the last step may have caused it, after the last training loss
                diverged, valid = True, {}
            elif test:
                self.progress.says("test")
                scores = self.task.test(applied)
        run = Run(
            key=key,
            task=self.task.name,
            method=self.name,
            seed=seed,
            learning_rate=rate,
            steps=fitted.steps,
            parameters=applied.parameter_count,
            head=applied.head_count,
            diverged=diverged,
            valid=valid,
            test=scores,
            seconds=fitted.seconds,
            peak_bytes=fitted.peak_bytes,
            file_bytes=sum(tensor.nbytes for tensor in applied.state_dict().values()),
            latency=0.0,
            base_latency=0.0,
        )
        if not test and not diverged:
            self._keep_if_best(run, applied)
        latency, base_latency = self._latencies(applied, model)
        run = dataclasses.replace(run, latency=latency, base_latency=base_latency)
        self.ledger.add(run)
        self.progress.finished(run)
        return run

    def _keep_if_best(self, run: Run, applied: Applied) -> None:
        score = run.valid[self.task.chosen_by]
        if best_tried({**self._tried, run.learning_rate: score}) == run.learning_rate:
            self._best = run, {name: tensor.clone() for name, tensor in applied.state_dict().items()}

    def _with_test(self, run: Run, trained: dict[str, Tensor]) -> Run:
        """The best run of the search with its scores on the test rows, from the weights that were kept."""
        _, applied = self._applied(run.seed)
        applied.load_state_dict(trained)
        self.progress.says("test")
        scores = self.task.test(applied)
        applied.remove()
        kept = self.ledger.get(run.key)
        assert kept is not None
        return dataclasses.replace(kept, test=scores)

    def _applied(self, seed: int) -> tuple[nn.Module, Applied]:
        model = self.task.model(seed)
        torch.manual_seed(seed)
        try:
            return model, apply(self.config.method, model, self.task)
        except ValueError as error:
            raise _NotApplicable(str(error)) from None

    def _latencies(self, applied: Applied, model: nn.Module) -> tuple[float, float]:
        """Seconds of a forward pass with the method and, on the same rows, without it.

        Removes the method from the model.
        """
        ours = served(applied, self.task.half)
        applied.remove()
        models = (ours, halved(copy.deepcopy(model)) if self.task.half else model)
        least = [float("inf")] * 2
        with torch.inference_mode():
            for _ in range(_TURNS):
                for index, one in enumerate(models):
                    began = time.perf_counter()
                    self.task.serve(one)
                    _wait()
                    least[index] = min(least[index], time.perf_counter() - began)
        return least[0], least[1]

    def _key(self, seed: int, rate: float) -> str:
        training = {name: getattr(self.config.training, name) for name in _DECIDES}
        method: Method = self.config.method
        return digest_of(self.task.fingerprint, self.task.name, method.name, method.settings, training, seed, rate)


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
        for name in _DECIDES
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


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
