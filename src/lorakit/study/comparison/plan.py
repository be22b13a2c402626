"""The plan of a comparison, before it runs: tasks with their rows and steps, methods with their trained parameters."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.errors import LoraError
from ...core.table import Table
from ...training.preflight import refuse_more_than_there_is
from ...training.report import heading
from ...training.terminal import to_width
from ..methods.baselines import Applied, Method, PrefixEmbedding, PrefixLayer
from ..methods.naming import name_of
from ..methods.structure import positions_of
from .config import CompareConfig, MethodConfig, tasks_of
from .fit import steps_of
from .tasks import StudyTask, digest_of, read_task

if TYPE_CHECKING:
    from .time_left import TimeLeft

DECIDES = (
    *("epochs", "max_steps", "batch_size", "gradient_accumulation_steps", "scheduler", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "label_smoothing", "gradient_checkpointing"),
)  # the training settings that change the result, besides the learning rate


@dataclass(frozen=True)
class TaskPlan:
    """A task, the methods to compare on it, and published scores."""

    task: StudyTask
    methods: Sequence[MethodConfig]
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """The cost of each method, by the method's name. No weight is loaded."""
        found = {}
        for method in self.methods:
            with FakeTensorMode():
                model = self.task.blueprint()
                try:
                    applied = apply(method.method, model, self.task)
                except ValueError as error:
                    found[name_of(method.method)] = Cost(left_out=str(error))
                    continue
                held = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
                trained = sum(parameter.nbytes for parameter in applied.parameters())
                # A gradient and AdamW's two moments.
                cost = Cost(applied.parameter_count, applied.head_count, least_bytes=held + 3 * trained)
                found[name_of(method.method)] = cost
        return found


@dataclass(frozen=True)
class Cost:
    """What a method trains on a task and the least memory that it needs, or why it is left out."""

    parameters: int = 0
    head: int = 0
    least_bytes: int = 0  # weights, gradients and the optimizer's moments, without activations
    left_out: str = ""

    def __str__(self) -> str:
        head = f" and {self.head:,} of the head" if self.head else ""
        return f"left out: {self.left_out}" if self.left_out else f"{self.parameters:>12,} parameters{head}"


def plans_of(config: CompareConfig) -> list[TaskPlan]:
    """Read and check the data of every task, before any weight is loaded."""
    plans = []
    for task in tasks_of(config):
        made = read_task(task, config.model)
        published = {
            label: score if isinstance(score, dict) else {made.metrics[0]: score}
            for label, score in task.data.published.items()
        }
        plans.append(TaskPlan(made, task.methods, published))
    return plans


def apply(method: Method, model: nn.Module, task: StudyTask) -> Applied:
    """Apply the method. Raises ValueError if the task's rows, with the method's prefix, do not fit into the model."""
    positions = positions_of(model)
    prefix = method.length if isinstance(method, PrefixEmbedding | PrefixLayer) else 0
    if positions is not None and task.longest + prefix > positions:
        beside = f", and the prefix {prefix}" if prefix else ""
        raise LoraError(
            f"the longest row of {task.name} has {task.longest} tokens{beside}, but the model has {positions} "
            f"positions; lower max_seq_length to {positions - prefix}."
        )
    return method.apply(model, task.head)


def run_key(task: StudyTask, method: MethodConfig, seed: int, rate: float) -> str:
    """The fingerprint of everything that decides the result of a run."""
    training = {name: getattr(method.training, name) for name in DECIDES}
    own = method.method
    return digest_of(task.fingerprint, task.name, own.name, own.settings, training, seed, rate)


def refuse_large_comparison(config: CompareConfig, plans: Sequence[TaskPlan]) -> None:
    """Raise ValueError for a method that needs more memory than the machine has, unless --ignore-memory is set."""
    if config.ignore_memory:
        return
    for plan in plans:
        for name, cost in plan.costs.items():
            what = f"{name} on {plan.task.name} needs at least"
            refuse_more_than_there_is(cost.least_bytes, what, ["other --methods", "a smaller model"])


def plan_block(config: CompareConfig, plans: Sequence[TaskPlan], left: TimeLeft) -> str:
    """The plan as text: rows and steps of each task, methods with their trained parameters, the number of runs, and how
    long those take that are still to be made.
    """
    lines = [heading("model").lstrip("\n"), config.model]
    for plan in plans:
        task, costs = plan.task, plan.costs
        rows = ", ".join(f"{name} {count:,}" for name, count in task.rows.items())
        steps = sorted({steps_of(task, method.training) for method in plan.methods})
        lines.append(heading(f"task {task.name}"))
        said = [
            f"{task.source}: {task.kind}; rows: {rows}; {' or '.join(map(str, steps))} steps a run",
            f"reported: {', '.join(task.metrics)}; rates chosen by {task.chosen_by} on validation rows",
        ]
        table = Table((), tuple((name, str(cost)) for name, cost in costs.items()), left=frozenset({0, 1}))
        lines += map(to_width, (*said, *(f"  {line}" for line in table.lines())))
    given = all(method.training.learning_rate is not None for plan in plans for method in plan.methods)
    rates = "learning rates given" if given else f"at most {config.trials} learning rates for a method on a task"
    lines.append(heading("runs"))
    seeds = "1 seed" if config.seeds == 1 else f"{config.seeds} seeds"
    lines.append(to_width(f"at most {left.most}: {seeds}, {rates}"))
    if left.seconds()[1] == left.runs() > 0:
        lines.append("how long they take is told after the first steps")
    else:
        lines.append(to_width(left.told() or "all are finished"))
    return "\n".join(lines)
