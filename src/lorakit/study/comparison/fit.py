"""Train an applied method once with transformers' Trainer, which does batching, AdamW, the schedule and the device.

Products may be in bfloat16. Weights are float32 for every method: full fine-tuning needs it, and the compared runs
should differ only in the method.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from ...training.base_trainer import BaseTrainer, arguments
from ...training.gradient_checkpointing import end_checkpointing
from ...training.memory import forget_peak, peak_memory
from ...training.plan import length_of
from ..methods.baselines import Applied
from .config import CompareConfig
from .tasks import Loss, StudyTask


@dataclass(frozen=True)
class Fitted:
    """What a training run cost, and whether its loss became NaN or infinite."""

    steps: int
    seconds: float
    peak_bytes: int
    diverged: bool


def training_arguments(training: CompareConfig, *, seed: int, learning_rate: float) -> TrainingArguments:
    """Trainer's arguments for a run that leaves nothing behind but what it trained."""
    return arguments(
        TrainingArguments,
        training,
        seed=seed,
        learning_rate=learning_rate,
        warmup=training.warmup_ratio if training.warmup_steps is None else training.warmup_steps,
        output_dir=tempfile.gettempdir(),  # nothing is saved
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        remove_unused_columns=False,
    )


def fit(
    applied: Applied,
    task: StudyTask,
    training: CompareConfig,
    *,
    seed: int,
    learning_rate: float,
    step: Callable[[], None],
) -> Fitted:
    """Train in place; the model is in eval mode afterwards. step: called after each step."""
    made = training_arguments(training, seed=seed, learning_rate=learning_rate)
    trainer = _Trainer(
        model=applied.model,
        args=made,
        train_dataset=list(task.train),
        data_collator=task.collate,
        callbacks=[Steps(step)],
    )
    trainer.loss = task.loss(applied.model, training.label_smoothing)
    trainer.model_accepts_loss_kwargs = False  # so that Trainer divides the loss when it accumulates gradients
    forget_peak(made.device)
    began = time.perf_counter()
    diverged = False
    try:
        trainer.train()
    except _Diverged:
        diverged = True
    seconds = time.perf_counter() - began
    peak = peak_memory(made.device)
    applied.model.eval()
    if training.gradient_checkpointing:
        end_checkpointing(applied.model)
    for parameter in applied.model.parameters():
        parameter.grad = None
    return Fitted(trainer.state.global_step, seconds, peak, diverged)


def steps_of(task: StudyTask, training: CompareConfig) -> int:
    """The number of steps that `fit` will take."""
    return length_of(task.rows["train"], training)[1]


class _Diverged(Exception):
    """The loss is NaN or infinite."""


class Steps(TrainerCallback):
    """Calls a function after each step."""

    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step()


class _Trainer(BaseTrainer):
    """A Trainer with the task's loss, which already knows its model."""

    loss: Loss

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        return self.loss(inputs)

    def no_number(self, inputs: dict[str, Any], loss: Tensor) -> Exception:
        return _Diverged()
