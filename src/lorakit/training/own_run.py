"""The run of one adapter among several in one pass: its settings, its rows, and which of them make each step."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from .plan import length_of

if TYPE_CHECKING:
    from .base_trainer import Schedule

_FULL = 1024  # tokens of a batch that fill a CPU: with more, a token takes no less time (`benchmarks/bank.py`)

Rows = Sequence[dict[str, Any]]


def most_tokens(device: torch.device) -> int:
    """The most tokens for which it pays to put the rows of several runs into one batch."""
    return _FULL if device.type == "cpu" else sys.maxsize


@dataclass(frozen=True)
class OwnRun:
    """The run of one adapter: its settings, the rows it learns, and its held-out rows."""

    schedule: Schedule
    learning_rate: float
    seed: int
    train: Rows
    valid: Rows = ()
    _orders: dict[int, list[int]] = field(default_factory=dict)  # of one epoch

    @cached_property
    def length(self) -> tuple[int, int]:
        """Its steps in an epoch, and in all."""
        return length_of(len(self.train), self.schedule)

    def batches(self, step: int) -> list[Rows]:
        """The batches of a step, counted from 0; none once the run is over."""
        in_epoch, steps = self.length
        if step >= steps:
            return []
        size, accumulation = self.schedule.batch_size, self.schedule.gradient_accumulation_steps
        order = self._order(step // in_epoch)
        first = step % in_epoch * accumulation
        places = (order[size * own : size * (own + 1)] for own in range(first, first + accumulation))
        return [[self.train[place] for place in own] for own in places if own]

    def _order(self, epoch: int) -> list[int]:
        """The order in which Trainer shows the rows in an epoch."""
        from accelerate.data_loader import SeedableRandomSampler

        if epoch not in self._orders:
            sampler = SeedableRandomSampler(range(len(self.train)), data_seed=self.seed)
            sampler.set_epoch(epoch)
            self._orders.clear()
            self._orders[epoch] = list(sampler)
        return self._orders[epoch]
