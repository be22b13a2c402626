"""Runs of a comparison that are trained in one pass, before each is scored and timed as a run of its own."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ...core.errors import LoraError
from ..methods.naming import name_of
from .fit import steps_of
from .progress import RunsProgress
from .runner import Order, Runner
from .tasks import StudyTask
from .together import MOST, can_share, train_together


class Passes:
    """The passes of one task. What was trained and is not scored yet lies in files of a folder."""

    def __init__(self, task: StudyTask, folder: Path) -> None:
        self._task, self._folder = task, folder

    def trained(self, order: Order, wanted: Sequence[Order], runner: Runner, progress: RunsProgress) -> Order:
        """The order with the file of what it trained, if it was trained with others, now or before.

        wanted: orders of the same method that are likely to come next. An order that is given back as it is has to be
        trained alone.
        """
        own = self._with_file(order)
        assert own.trained is not None
        if own.trained.is_file():
            return own
        others = [self._with_file(other) for other in wanted][: MOST - 1]
        if not others or not can_share(self._task, order.config):
            return order
        what = f"{name_of(order.config.method)}, {len(others) + 1} runs in one pass"
        steps = steps_of(self._task, order.config.training)
        progress.run(self._task.name, what, order.seed, order.learning_rate, steps)
        with contextlib.suppress(LoraError):  # a run alone tells what does not fit
            runner.do(functools.partial(train_together, others=others), self._task, own, progress)
        return own if own.trained.is_file() else order

    def _with_file(self, order: Order) -> Order:
        return replace(order, trained=self._folder / f"trained-{order.key}")
