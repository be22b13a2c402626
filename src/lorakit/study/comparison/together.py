"""Train several runs of LoRA in one pass (`training/one_pass.py`): each learns what `fit` would teach it alone.

The products of the base are shared, so small batches fill a GPU. What the runs take is then known of all of them
together alone: time is divided by their number, and the peak of memory is that of the pass.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...bank.bank import Bank
from ...training.gradient_checkpointing import end_checkpointing
from ...training.memory import forget_peak, peak_memory
from ...training.one_pass import OnePass
from ...training.own_run import OwnRun
from ..methods.baselines import Applied, LoRA
from .config import MethodConfig
from .fit import Fitted, Steps, training_arguments
from .runner import Order, Watch
from .tasks import Answers, StudyTask

MOST = 8  # runs in one pass: on a GPU their rows are in one batch


def can_share(task: StudyTask, config: MethodConfig) -> bool:
    """Whether runs of this method can be made in one pass and are then the same mathematics as alone.

    A classifier's new head and DoRA's gain are shared by the rows of a batch, and `fit` gives each of several batches
    that are added up the same weight, whatever labels it has.
    """
    method = config.method
    return (
        isinstance(task, Answers)
        and isinstance(method, LoRA)
        and not method.dora
        and config.training.gradient_accumulation_steps == 1
    )


def train_together(task: StudyTask, order: Order, watch: Watch, others: Sequence[Order] = ()) -> None:
    """Train an order and others in one pass, and leave what each came to in its file `trained`."""
    orders = [order, *others]
    for own, (tensors, fitted) in zip(orders, fit_together(task, orders, watch.step), strict=True):
        assert own.trained is not None
        torch.save({"tensors": tensors, "fitted": dataclasses.asdict(fitted), "together": len(orders)}, own.trained)


def take_trained(applied: Applied, file: Path) -> tuple[Fitted, int]:
    """Load what a run trained; returns what it cost, and how many runs were trained with it in one pass."""
    found = torch.load(file, weights_only=True)
    applied.load_state_dict(found["tensors"])
    applied.model.eval()
    return Fitted(**found["fitted"]), found["together"]


def fit_together(
    task: StudyTask, wanted: Sequence[Order], step: Callable[[], None]
) -> list[tuple[dict[str, Tensor], Fitted]]:
    """What each run trained, by names as `Applied.load_state_dict` takes them, and what it cost.

    step: called after each step. The model is afterwards as it was. Raises LoraError for a method that does not fit the
    model, or whose adapter cannot be one of several in a batch.
    """
    model, training = task.model(wanted[0].seed), wanted[0].config.training
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    bank = Bank(model)
    try:
        names = {str(place): own for place, own in enumerate(wanted)}
        for name, own in names.items():
            assert isinstance(own.config.method, LoRA)
            torch.manual_seed(own.seed)
            bank[name] = own.config.method.settings_on(model)
            bank.seeds[name] = own.seed
        runs = {
            name: OwnRun(own.config.training, own.learning_rate, own.seed, task.train) for name, own in names.items()
        }
        bank.use("0")  # a trainer looks at what is adapted
        trainer = _trainer(task, model, training, bank, runs, step)
        device = trainer.args.device
        forget_peak(device)
        began = time.perf_counter()
        with bank.rows(list(names)):
            trainer.train()
        seconds = (time.perf_counter() - began) / len(wanted)
        peak = peak_memory(device)
        found = []
        for name in names:
            diverged = name in trainer.diverged
            steps = trainer.diverged.get(name, trainer.state.global_step)
            bank.use(name)
            found.append((_tensors(model), Fitted(steps, seconds, peak, diverged)))
        return found
    finally:
        bank.use(None)
        if training.gradient_checkpointing:
            end_checkpointing(model)
        model.eval()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = flags[name]


def _trainer(
    task: StudyTask, model: nn.Module, training: Any, bank: Bank, runs: dict[str, OwnRun], step: Callable[[], None]
) -> _Trainer:
    return _Trainer(
        task=task,
        model=model,
        args=training_arguments(training, seed=0, learning_rate=1.0),  # each run has its own seed and rate
        train_dataset=list(task.train),
        data_collator=task.collate,
        callbacks=[Steps(step)],
        bank=bank,
        runs=runs,
        label_smoothing=training.label_smoothing,
    )


class _Trainer(OnePass):
    """With products in the precision of the task."""

    def __init__(self, *args: Any, task: Any, **kwargs: Any) -> None:
        self._task = task
        with task.products():
            super().__init__(*args, **kwargs)

    def _losses(self, model: nn.Module, batch: Any) -> Tensor:
        with self._task.products():
            return super()._losses(model, batch)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The factors of the adapter in use, with the constants that some inits keep (PiSSA's A₀ and B₀)."""
    return {
        name: tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[2].startswith("lora_")
    }
