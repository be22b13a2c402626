"""The runs of a comparison: for each task and method the search for a learning rate, then every seed at the best one.

Each finished run is a line of runs.jsonl, and a run that stands there is not made again: an interrupted comparison
goes on where it was, and one with more seeds or methods makes the new ones alone.

The search's best run is the run of seed 0. Its weights are kept in memory until the search is over, so that it need
not be trained twice, and the answers of the others need not be generated.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...formats.files import replacing
from ...training.memory import keep_few_kernels
from ...training.report import heading
from ..methods.baselines import Applied, Method, PrefixEmbedding, PrefixLayer
from ..methods.naming import name_of
from ..methods.structure import positions_of
from .config import CompareConfig, MethodConfig, tasks_of
from .fit import fit, steps_of
from .progress import Progress
from .results import Comparison, Ledger, Row, Run, TaskFacts, row_of
from .search import best_rate, next_rate
from .tasks import Task, fingerprint, halved, served, task_of

RUNS, MACHINE = "runs.jsonl", "machine.json"
_TURNS = 7  # of the two models whose latency is compared, interleaved; the least time of each counts
_DECIDES = (
    *("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "scheduler", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "label_smoothing", "gradient_checkpointing"),
)  # settings of training that change what comes out, besides the learning rate


@dataclass(frozen=True)
class Plan:
    """A task, the methods to compare on it, and what was published of it."""

    task: Task
    methods: Sequence[MethodConfig]
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def compare(
    model: str,
    plans: Sequence[Plan],
    folder: Path,
    *,
    seeds: int,
    trials: int,
    so_far: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Make the runs that `folder` does not hold yet, and return what all of them say.

    so_far: make none, and return what those in the folder say. Raises ValueError where no method can be applied.
    """
    keep_few_kernels()
    folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(folder / RUNS)
    progress = progress or Progress()
    progress.begin(sum(_most_runs(method, seeds, trials) for plan in plans for method in plan.methods))
    rows: list[Row] = []
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
                progress.advance_to_method_end(_most_runs(method, seeds, trials))
    if left_out and not rows and finished:
        raise ValueError("no method can be applied. {}: {}: {}".format(*left_out[0]))
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
    """A run that is wanted stands in no ledger, and none is to be made."""


class _Runs:
    """The runs of one method on one task. so_far: those of the ledger alone."""

    def __init__(self, task: Task, config: MethodConfig, ledger: Ledger, progress: Progress, so_far: bool) -> None:
        self.task, self.config, self.ledger, self.progress, self.so_far = task, config, ledger, progress, so_far
        self.complete = True
        self.name = name_of(config.method)
        self._best: tuple[Run, dict[str, Tensor]] | None = None  # of this search: a run, and what it trained

    def of_all_seeds(self, seeds: int, trials: int) -> Row:
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
        """The best learning rate, and the runs that say so. Where every run diverged, the lowest."""
        runs: dict[float, Run] = {}
        tried: dict[float, float | None] = {}
        while (rate := next_rate(self.config.method, tried, trials)) is not None:
            key = self._key(0, rate)
            run = self.ledger.get(key) or self._made(key, 0, rate, test=False)
            runs[rate] = run
            tried[rate] = None if run.diverged else run.valid[self.task.chosen_by]
            if self._best is not None and self._best[0].learning_rate != best_rate(tried):
                self._best = None
        return best_rate(tried) or min(tried), list(runs.values())

    def _tested(self, seed: int, rate: float) -> Run:
        key = self._key(seed, rate)
        run = self.ledger.get(key)
        if run is not None and (run.test or run.diverged):
            return run
        if run is not None and self._best is not None and self._best[0].key == key:
            run = self._with_test(*self._best)
            self._best = None
            self.ledger.add(run)
            return run
        return self._made(key, seed, rate, test=True)

    def _made(self, key: str, seed: int, rate: float, *, test: bool) -> Run:
        """Train, score, take the time, and write it down."""
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
            if not math.isfinite(valid[self.task.chosen_by]):  # after the last step, which no loss of training saw
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
        by = self.task.chosen_by

        def order(one: Run) -> tuple[float, float]:
            return one.valid[by], one.learning_rate  # as `best_rate` has it

        if self._best is None or order(run) < order(self._best[0]):
            self._best = run, {name: tensor.clone() for name, tensor in applied.state_dict().items()}

    def _with_test(self, run: Run, trained: dict[str, Tensor]) -> Run:
        """The best run of the search with the scores on the test rows, from the weights that were kept."""
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
            return model, _apply(self.config.method, model, self.task)
        except ValueError as error:
            raise _NotApplicable(str(error)) from None

    def _latencies(self, applied: Applied, model: nn.Module) -> tuple[float, float]:
        """Seconds of a forward pass with the method and, on the same rows, of the model without it.

        Takes the method out of the model.
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
        return fingerprint(self.task.fingerprint, self.task.name, method.name, method.settings, training, seed, rate)


def _apply(method: Method, model: nn.Module, task: Task) -> Applied:
    """Apply the method, if the task's rows fit into the model then. Raises ValueError."""
    positions = positions_of(model)
    prefix = method.length if isinstance(method, PrefixEmbedding | PrefixLayer) else 0
    if positions is not None and task.longest + prefix > positions:
        beside = f", and the prefix {prefix}" if prefix else ""
        raise ValueError(
            f"the longest row of {task.name} has {task.longest} tokens{beside}, but the model has {positions} "
            f"positions; lower max_seq_length to {positions - prefix}."
        )
    return method.apply(model, task.head)


def plan_block(config: CompareConfig, plans: Sequence[Plan]) -> str:
    """What will be run, before it is: rows and steps of each task, methods with their trained parameters."""
    lines = [heading("model").lstrip("\n"), config.model]
    for plan in plans:
        task, counted = plan.task, _counted(plan)
        rows = ", ".join(f"{name} {count:,}" for name, count in task.rows.items())
        steps = sorted({steps_of(task, method.training) for method in plan.methods})
        lines.append(heading(f"task {task.name}"))
        lines.append(f"{task.source}: {task.kind}; rows: {rows}; {' or '.join(map(str, steps))} steps a run")
        lines.append(f"reported: {', '.join(task.metrics)}; rates chosen by {task.chosen_by} on validation rows")
        width = max(map(len, counted))
        lines += [f"  {name:<{width}}  {said}" for name, said in counted.items()]
    most = sum(_most_runs(method, config.seeds, config.trials) for plan in plans for method in plan.methods)
    lines.append(heading("runs"))
    lines.append(f"at most {most}: {config.seeds} seeds, at most {config.trials} learning rates for a method on a task")
    return "\n".join(lines)


def _most_runs(method: MethodConfig, seeds: int, trials: int) -> int:
    """Of a method on a task: the best of the search is the run of seed 0, and a given rate is not searched."""
    return seeds if method.training.learning_rate is not None else seeds + trials - 1


def _counted(plan: Plan) -> dict[str, str]:
    """For each method how many parameters it trains, or why it cannot be applied; no weight is loaded for it."""
    said = {}
    for method in plan.methods:
        with FakeTensorMode():
            model = plan.task.blueprint()
            try:
                applied = _apply(method.method, model, plan.task)
            except ValueError as error:
                said[name_of(method.method)] = f"left out: {error}"
                continue
            head = f" and {applied.head_count:,} of the head" if applied.head_count else ""
            said[name_of(method.method)] = f"{applied.parameter_count:>12,} parameters{head}"
    return said


def _made_on(folder: Path, now: bool) -> dict[str, str]:
    """The machine of the last runs, which stands in the folder: tables made anew later do not come from elsewhere."""
    path = folder / MACHINE
    if now or not path.is_file():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(machine(), indent=1) + "\n", encoding="utf-8")
    found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def machine() -> dict[str, str]:
    """What the times were taken on, and with what."""
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lorakit": _version(),
    }


def _facts(plan: Plan) -> TaskFacts:
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


def plans_of(config: CompareConfig) -> list[Plan]:
    """Read and check the data of every task, before any weight is loaded."""
    plans = []
    for task in tasks_of(config):
        made = task_of(task, config.model)
        published = {
            label: score if isinstance(score, dict) else {made.metrics[0]: score}
            for label, score in task.data.published.items()
        }
        plans.append(Plan(made, task.methods, published))
    return plans


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version() -> str:
    """lorakit's version, and the commit where it runs from its repository."""
    folder = Path(__file__).resolve().parents[4]
    if not (folder / ".git").exists():
        return version("lorakit")
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude", "*"]
    with contextlib.suppress(OSError):
        described = subprocess.run(git, capture_output=True, text=True).stdout.strip()
        return f"{version('lorakit')} at {described}" if described else version("lorakit")
    return version("lorakit")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or os.uname().machine
