"""What will be run, told before it is: tasks with their rows and steps, methods with their trained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...training.report import heading
from ..methods.baselines import Applied, Method, PrefixEmbedding, PrefixLayer
from ..methods.naming import name_of
from ..methods.structure import positions_of
from .config import CompareConfig, MethodConfig, tasks_of
from .fit import steps_of
from .tasks import Task, task_of


@dataclass(frozen=True)
class Plan:
    """A task, the methods to compare on it, and what was published of it."""

    task: Task
    methods: Sequence[MethodConfig]
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


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


def apply(method: Method, model: nn.Module, task: Task) -> Applied:
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


def most_runs(method: MethodConfig, seeds: int, trials: int) -> int:
    """Of a method on a task: the best of the search is the run of seed 0, and a given rate is not searched."""
    return seeds if method.training.learning_rate is not None else seeds + trials - 1


def most_runs_of(plans: Sequence[Plan], seeds: int, trials: int) -> int:
    """Of all methods on all tasks."""
    return sum(most_runs(method, seeds, trials) for plan in plans for method in plan.methods)


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
    most = most_runs_of(plans, config.seeds, config.trials)
    given = all(method.training.learning_rate is not None for plan in plans for method in plan.methods)
    rates = "learning rates given" if given else f"at most {config.trials} learning rates for a method on a task"
    lines.append(heading("runs"))
    lines.append(f"at most {most}: {config.seeds} seeds, {rates}")
    return "\n".join(lines)


def _counted(plan: Plan) -> dict[str, str]:
    """For each method how many parameters it trains, or why it cannot be applied; no weight is loaded for it."""
    said = {}
    for method in plan.methods:
        with FakeTensorMode():
            model = plan.task.blueprint()
            try:
                applied = apply(method.method, model, plan.task)
            except ValueError as error:
                said[name_of(method.method)] = f"left out: {error}"
                continue
            head = f" and {applied.head_count:,} of the head" if applied.head_count else ""
            said[name_of(method.method)] = f"{applied.parameter_count:>12,} parameters{head}"
    return said
