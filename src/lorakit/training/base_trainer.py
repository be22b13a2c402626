"""What `train` and `compare` share: transformers' Trainer with lorakit's own loss, and the Trainer's arguments.

Trainer provides the random order of batches by the seed, AdamW, the schedule, clipping and devices. A loss that is NaN
or infinite ends a run before it changes a weight. Nothing is printed.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainingArguments

from .gradient_checkpointing import checkpointing
from .models import best_device

Arguments = TypeVar("Arguments", bound=TrainingArguments)


class Schedule(Protocol):
    """The settings that say how long and how a run trains. Both TrainConfig and the settings of `compare` have them."""

    @property
    def epochs(self) -> float: ...
    @property
    def max_steps(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def gradient_accumulation_steps(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def scheduler(self) -> str: ...
    @property
    def gradient_checkpointing(self) -> bool: ...


def arguments(
    kind: type[Arguments], schedule: Schedule, *, seed: int, learning_rate: float, warmup: float, **further: Any
) -> Arguments:
    """Make `kind` (TrainingArguments or a subclass) from `schedule` and the command's `further` arguments.

    warmup: a number of steps; below 1, a share of all steps.
    """
    device = best_device().type
    with contextlib.redirect_stdout(io.StringIO()):
        made: Arguments = kind(
            num_train_epochs=schedule.epochs,
            max_steps=schedule.max_steps or -1,
            per_device_train_batch_size=schedule.batch_size,
            gradient_accumulation_steps=schedule.gradient_accumulation_steps,
            learning_rate=learning_rate,
            weight_decay=schedule.weight_decay,
            lr_scheduler_type=schedule.scheduler,
            warmup_steps=warmup,
            use_cpu=device == "cpu",
            seed=seed,
            data_seed=seed,
            # Batches of rows of similar length would save the padding, a tenth of the work on short rows. But such rows
            # are often of one kind: the demo's exact match fell from 83 % to 76 % (one run each, seed 0).
            train_sampling_strategy="random",
            disable_tqdm=True,
            dataloader_pin_memory=device == "cuda",
            **checkpointing(schedule.gradient_checkpointing),
            **further,
        )
    # A process has one device. On several GPUs Trainer would multiply the rows of a step by their number.
    made._n_gpu = min(made.n_gpu, 1)
    return made


class BaseTrainer(Trainer):
    """A Trainer whose loss is `loss_of`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def loss_of(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The mean loss of a batch, or its share of the mean over `num_items_in_batch` labels."""
        raise NotImplementedError

    def timed(self, inputs: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
        """Around the forward pass of a batch, for those who time it."""
        return contextlib.nullcontext()

    def no_number(self, inputs: dict[str, Any], loss: Tensor) -> Exception:
        """The error for a batch whose loss is NaN or infinite."""
        raise NotImplementedError

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """`loss_of`; while training, a loss that is NaN or infinite ends the run."""
        loss = self.loss_of(model, inputs, num_items_in_batch)
        if self.model.training and not torch.isfinite(loss).all():
            raise self.no_number(inputs, loss)
        return loss
