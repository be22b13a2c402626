"""The trainer of several runs in one pass, for `lorakit train`: with the losses of each in its log."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from .divergence import When
from .one_pass import OnePass
from .trainers import CausalTrainer
from .tried import Trial
from .watch import FirstStep


def mean_of_finite(losses: Collection[float]) -> float:
    """The mean over all runs but those that diverged; infinite if all did."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.inf


class OnePassTrainer(OnePass, CausalTrainer):
    """With the losses of each adapter in the log, in training and on its held-out rows."""

    def __init__(self, *args: Any, overall: Callable[[Collection[float]], float], **kwargs: Any) -> None:
        """overall: the loss of all of them, from the loss of each. An infinite one is that of a run that diverged."""
        super().__init__(*args, **kwargs)
        self._overall, self.keeps_checkpoints = overall, False
        self.remove_callback(FirstStep)  # `Bank.rows` itself tells of layers that do nothing
        self.heldout: dict[str, float] = {}
        self.last: dict[str, float] = {}  # the mean loss of each in the newest lines of metrics.jsonl
        self._evaluated = self._zeros()  # the sums of the held-out losses,
        self._labels = self._zeros()  # which are of so many labels

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The losses of each adapter, and what they are together: "loss" and "eval_loss"."""
        if "loss" in logs:
            newest = self._means(self._seen, self._seen_steps)
            self.last |= newest
            logs["loss"] = self._overall(newest.values()) if newest else math.nan
            logs |= {f"loss {name}": value for name, value in newest.items()}
            self._seen, self._seen_steps = self._zeros(), self._zeros()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated, self._labels = self._zeros(), self._zeros()
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.heldout = self._means(self._evaluated, self._labels)
        found.metrics[f"{metric_key_prefix}_loss"] = self._overall(self.heldout.values())
        found.metrics.update({f"{metric_key_prefix}_loss {name}": value for name, value in self.heldout.items()})
        return found

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, None, None]:
        for batch in self._prepare_inputs(inputs)["batches"]:
            self._bank.assign([self._names[place] for place in batch["runs"].tolist()])
            with torch.no_grad(), self.compute_loss_context_manager():
                self._evaluated += self._losses(model, batch).to("cpu", torch.float64)
            self._labels += self._labels_of(batch)
        return self._evaluated.sum(), None, None

    @property
    def trials(self) -> dict[str, Trial]:
        """What each adapter has come to."""
        steps = self.state.global_step
        return {
            name: Trial(name, steps, math.inf, math.inf, f"diverged at step {self.diverged[name]}")
            if name in self.diverged
            else Trial(name, steps, self.last.get(name), self.heldout.get(name))
            for name in self._names
        }

    def _means(self, sums: Tensor, counts: Tensor) -> dict[str, float]:
        """The mean of each adapter that has one, infinite if it diverged."""
        values = zip(self._names, sums.tolist(), counts.tolist(), strict=True)
        return {
            name: value / count if name not in self.diverged and math.isfinite(value) else math.inf
            for name, value, count in values
            if count
        }

    def refuse_diverged(self, when: When = "at the end") -> None:
        """Nothing: an adapter that diverges is noticed at its step."""
