"""Several settings trained in one pass over the data: `lorakit train --sweep "learning_rate=1e-4,3e-4 rank=4,16"`.

Each combination of the values is an adapter of its own in a `Bank`, with its own learning rate, rank and optimizer
state. A step shows the same rows to all of them, in one batch, so the base's products are shared and small batches fill
the machine. What each adapter learns is what it would learn alone: its loss is the mean over its own copies of the
rows, clipping looks at its own gradients, and it starts from the factors that the seed gives it alone. Only masks of
dropout are others. An adapter that diverges stops, and the others go on.

The best one has the lowest held-out loss, or without held-out rows the lowest last loss. The run then ends as if it
had been trained alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bank.bank import Bank
from ..core.settings import LoRASettings
from .config import TrainConfig
from .divergence import Diverged, When
from .loss import frozen_head, label_losses, labelled
from .trainers import CausalTrainer
from .tried import Trial, Tried
from .watch import FirstStep

FILE, FOLDER = "sweep.json", "sweep"


def frozen_bank(model: nn.Module) -> Bank:
    """A bank without adapters, on a frozen model."""
    model.requires_grad_(False)
    return Bank(model)


def add_fresh(bank: Bank, choices: Mapping[str, TrainConfig]) -> None:
    """Add a fresh adapter for each of the choices. Each begins as it would alone: all from the present random state."""
    state = torch.get_rng_state()
    for name, config in choices.items():
        torch.set_rng_state(state)
        bank[name] = dataclasses.replace(LoRASettings.of(config), dtype=None)
        bank.seeds[name] = config.seed


class SweepTrainer(CausalTrainer):
    """CausalTrainer for all adapters of a bank at once, inside `bank.rows(list(bank))`."""

    def __init__(self, *args: Any, bank: Bank, choices: Mapping[str, TrainConfig], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(FirstStep)  # `Bank.rows` itself tells of layers that do nothing
        self._choices = choices
        self._parameters = {name: bank.parameters(name) for name in choices}
        self._head, self._fused = frozen_head(self.model), False
        self.diverged: dict[str, int] = {}  # the step of each
        self.heldout: dict[str, float] = {}
        self.last: dict[str, float] = {}  # the mean loss since the last line of metrics.jsonl
        self._seen = torch.zeros(len(choices), dtype=torch.float64)  # the sum of the losses since that line,
        self._seen_until = 0  # which was at this step
        self._evaluated = torch.zeros(len(choices), dtype=torch.float64)  # the sum of the held-out losses,
        self._labels = 0  # of so many labels

    def create_optimizer(self, model: Any = None) -> Any:
        kind, arguments = self.get_optimizer_cls_and_kwargs(self.args)
        groups = [
            {"params": self._parameters[name], "lr": own.learning_rate, "weight_decay": own.weight_decay}
            for name, own in self._choices.items()
        ]
        made = self.optimizer = kind(groups, **arguments)
        # Trainer clears the gradients of the model's own parameters, among which these are not.
        made.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
        return made

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The sum over the adapters of their mean losses, each on its own copy of the rows."""
        count, rows = len(self._choices), len(inputs["input_ids"])
        copies = {name: value.repeat(count, *(1,) * (value.dim() - 1)) for name, value in inputs.items()}
        where = labelled(copies.pop("labels"))
        losses = label_losses(where, model, copies, self._head)
        items = self.count(inputs) if num_items_in_batch is None else num_items_in_batch
        own = losses.new_zeros(count).index_add(0, where.rows // rows, losses) / torch.as_tensor(items).clamp(min=1)
        measured = own.detach().to("cpu", torch.float64)
        if model.training:
            self._seen += measured
        else:
            self._evaluated += measured * int(items)
            self._labels += int(items)
        going = torch.tensor([name not in self.diverged for name in self._choices], device=own.device)
        return torch.where(going & own.isfinite(), own, torch.zeros_like(own)).sum()

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each adapter's gradients by their own norm. One whose gradients are not finite stops here."""
        largest = torch.zeros(())
        for name, parameters in self._parameters.items():
            if name in self.diverged:
                norm = torch.tensor(math.nan)
            else:
                norm = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
            if not norm.isfinite():
                self.diverged.setdefault(name, self.state.global_step + 1)
                for parameter in parameters:
                    parameter.grad = None
            else:
                largest = torch.maximum(largest, norm.detach().cpu())
        if len(self.diverged) == len(self._choices):
            self.control.should_training_stop = True
        return largest

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The losses of each adapter. "loss" and "eval_loss" are the lowest ones."""
        if "loss" in logs:
            self.last = self._means(self._seen, self.state.global_step - self._seen_until)
            self._seen_until = self.state.global_step
            logs["loss"] = min(self.last.values())
            logs |= {f"loss {name}": value for name, value in self.last.items()}
            self._seen.zero_()
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        self._evaluated.zero_()
        self._labels = 0
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.heldout = self._means(self._evaluated, self._labels)
        found.metrics[f"{metric_key_prefix}_loss"] = min(self.heldout.values())
        found.metrics.update({f"{metric_key_prefix}_loss {name}": value for name, value in self.heldout.items()})
        return found

    @property
    def trials(self) -> dict[str, Trial]:
        """What each adapter has come to."""
        steps = self.state.global_step
        return {
            name: Trial(name, steps, math.inf, math.inf, f"diverged at step {self.diverged[name]}")
            if name in self.diverged
            else Trial(name, steps, self.last.get(name), self.heldout.get(name))
            for name in self._choices
        }

    def _means(self, sums: Tensor, count: int) -> dict[str, float]:
        """The mean of each adapter, infinite if it diverged."""
        values = (sums / max(count, 1)).tolist()
        return {
            name: value if name not in self.diverged and math.isfinite(value) else math.inf
            for name, value in zip(self._choices, values, strict=True)
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Nothing: a sweep is not resumed."""

    def refuse_diverged(self, when: When = "at the end") -> None:
        """Nothing: an adapter that diverges is noticed at its step."""


def best_of(trials: Mapping[str, Trial]) -> str:
    """The name of the best adapter."""
    best = min(trials, key=lambda name: trials[name].score)
    if not math.isfinite(trials[best].score):
        raise Diverged(f"all {len(trials)} adapters of the sweep diverged; lower the learning rates.")
    return best


def lines_of(history: Iterable[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """What was logged of one adapter, as lines of metrics.jsonl of a run alone."""
    losses = {f"loss {name}": "loss", f"eval_loss {name}": "eval_loss"}
    return [
        {losses.get(key, key): value for key, value in line.items() if key in ("step", "epoch", "seconds", *losses)}
        for line in history
    ]


def write_sweep(tried: Tried, bank: Bank, folder: Path) -> None:
    """Write every adapter that did not diverge into the folder, and what each reached."""
    for trial in tried.trials:
        if not trial.fate:
            bank[trial.name].save(folder / FOLDER / trial.name.replace(" ", ","))
    (folder / FILE).write_text(tried.as_json(), encoding="utf-8")
