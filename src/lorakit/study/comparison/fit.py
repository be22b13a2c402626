"""One training of an applied method, on transformers' Trainer: batching, AdamW, the schedule and the device are its.

Products may be in bfloat16, weights are float32 for every method: full fine-tuning needs it, and what is compared is
to differ in the method alone.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ...training.loop import checkpointing
from ...training.memory import forget_peak, peak_memory
from ..methods.baselines import Applied
from .config import CompareConfig
from .tasks import Loss, Task


@dataclass(frozen=True)
class Fitted:
    """What a training cost, and whether its loss stayed a number."""

    steps: int
    seconds: float
    peak_bytes: int
    diverged: bool


def fit(
    applied: Applied, task: Task, training: CompareConfig, *, seed: int, learning_rate: float, step: Callable[[], None]
) -> Fitted:
    """Train in place; the model is in eval mode afterwards. step: called after each step."""
    arguments = _arguments(training, seed, learning_rate)
    trainer = _Trainer(
        model=applied.model,
        args=arguments,
        train_dataset=list(task.train),
        data_collator=task.collate,
        callbacks=[_Steps(step)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.loss = task.loss(applied.model, training.label_smoothing)
    trainer.model_accepts_loss_kwargs = False  # so that Trainer divides the loss when batches are added up
    forget_peak(arguments.device)
    began = time.perf_counter()
    diverged = False
    try:
        trainer.train()
    except _Diverged:
        diverged = True
    seconds = time.perf_counter() - began
    peak = peak_memory(arguments.device)
    applied.model.eval()
    if training.gradient_checkpointing:
        _end_checkpointing(applied.model)
    for parameter in applied.model.parameters():
        parameter.grad = None
    return Fitted(trainer.state.global_step, seconds, peak, diverged)


def steps_of(task: Task, training: CompareConfig) -> int:
    """How many steps `fit` will make."""
    if training.max_steps is not None:
        return training.max_steps
    batches = -(-task.rows["train"] // training.batch_size)
    each = max(1, -(-batches // training.gradient_accumulation_steps))
    return math.ceil(training.epochs * each)  # as Trainer reckons, in binary numbers too


def _end_checkpointing(model: Any) -> None:
    """One model may serve several runs, and the next one has settings of its own."""
    new = hasattr(model, "activation_checkpointing_disable")  # transformers renamed this one
    (model.activation_checkpointing_disable if new else model.gradient_checkpointing_disable)()
    model.disable_input_require_grads()  # put in with it, and not taken out


class _Diverged(Exception):
    """The loss is no number."""


class _Steps(TrainerCallback):
    def __init__(self, step: Callable[[], None]) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.step()


class _Trainer(Trainer):
    """Trainer with the task's loss, and an end to a run whose loss is no number."""

    loss: Loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        loss = self.loss(inputs)
        if not torch.isfinite(loss):
            raise _Diverged
        return loss


def _arguments(training: CompareConfig, seed: int, learning_rate: float) -> TrainingArguments:
    warmup = training.warmup_ratio if training.warmup_steps is None else training.warmup_steps
    settings: dict[str, Any] = {
        "output_dir": tempfile.gettempdir(),  # nothing is saved
        "num_train_epochs": training.epochs,
        "max_steps": training.max_steps or -1,
        "per_device_train_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "learning_rate": learning_rate,
        "weight_decay": training.weight_decay,
        "lr_scheduler_type": training.scheduler,
        "warmup_steps": warmup,
        **checkpointing(training.gradient_checkpointing),
        "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
        "seed": seed,
        "data_seed": seed,
        "train_sampling_strategy": "random",
        "save_strategy": "no",
        "eval_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        arguments = TrainingArguments(**settings)
    # On several GPUs Trainer would multiply the rows of a step by their number; runs are compared on one.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
