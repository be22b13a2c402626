"""One run of a comparison: a method is applied, trained, scored and timed.

The two functions here are all that a run does with a model. They need nothing of the comparison but an `Order`, and
give back plain data, so a `Runner` can call them in this process or in another one (`processes.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import nn

from ...training.ladder import best_tried
from ..methods.baselines import Applied
from ..methods.naming import name_of
from .fit import fit
from .latency import Seconds, in_turns
from .plan import apply
from .results import Run
from .runner import Order, Watch
from .tasks import StudyTask, halved, served
from .together import take_trained


class NotApplicable(Exception):
    """Why the method cannot be applied to the model."""


def make_run(task: StudyTask, order: Order, watch: Watch) -> Run:
    """Train, score and measure the latency. Raises NotApplicable.

    A run of a search is scored on the validation rows, and leaves what it trained in `order.weights` if it is the best
    one so far; any other run is scored on the test rows too.
    """
    model, applied = _applied(task, order)
    if order.trained is not None:
        fitted, together = take_trained(applied, order.trained)
    else:
        together, training = 1, order.config.training
        fitted = fit(applied, task, training, seed=order.seed, learning_rate=order.learning_rate, step=watch.step)
    diverged = fitted.diverged
    valid: dict[str, float] = {}
    scores: dict[str, float] = {}
    if not diverged:
        watch.says("validation")
        valid = task.validate(applied)
        # The last step may have broken the weights, after the last training loss.
        diverged = not math.isfinite(valid[task.chosen_by])
    if diverged:
        valid = {}
    elif order.rivals is None:
        watch.says("test")
        scores = task.test(applied)
    elif best_tried({**order.rivals, order.learning_rate: valid[task.chosen_by]}) == order.learning_rate:
        torch.save(applied.state_dict(), order.weights)
    run = Run(
        key=order.key,
        task=task.name,
        method=name_of(order.config.method),
        seed=order.seed,
        learning_rate=order.learning_rate,
        steps=fitted.steps,
        parameters=applied.parameter_count,
        head=applied.head_count,
        diverged=diverged,
        valid=valid,
        test=scores,
        seconds=fitted.seconds,
        peak_bytes=fitted.peak_bytes,
        file_bytes=sum(tensor.nbytes for tensor in applied.state_dict().values()),
        latency=(),
        base_latency=(),
        together=together,
    )
    latency, base_latency = _latencies(task, applied, model)
    return dataclasses.replace(run, latency=latency, base_latency=base_latency)


def score_kept(task: StudyTask, order: Order, watch: Watch) -> dict[str, float]:
    """The scores on the test rows of the run whose weights are in `order.weights`."""
    _, applied = _applied(task, order)
    applied.load_state_dict(torch.load(order.weights, weights_only=True))
    watch.says("test")
    scores = task.test(applied)
    applied.remove()
    return scores


def _applied(task: StudyTask, order: Order) -> tuple[nn.Module, Applied]:
    model = task.model(order.seed)
    torch.manual_seed(order.seed)
    try:
        return model, apply(order.config.method, model, task)
    except ValueError as error:
        raise NotApplicable(str(error)) from None


def _latencies(task: StudyTask, applied: Applied, model: nn.Module) -> tuple[Seconds, Seconds]:
    """`in_turns` with the method and without it. Removes the method from the model."""
    ours = served(applied, task.half)
    applied.remove()
    return in_turns(task.serve, ours, halved(copy.deepcopy(model)) if task.half else model)
