"""What a run will take, told before it starts: steps, tokens, peak memory. `pace.py` tells the time, from real steps.

The memory is counted, not guessed: `memory.py` runs one training step on the model built of fake tensors and notes
every storage. To its peak come the weights, the optimizer's moments and, on a CPU, what the process holds before a
model is loaded (interpreter, libraries, data) and a margin that was measured. What loading the model takes for itself
is not counted.

"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from unittest import mock

from torch import Tensor, nn

from .memory import margin, resident_memory, step_storages

if TYPE_CHECKING:
    from .base_trainer import Schedule


@dataclass(frozen=True)
class Plan:
    """steps: optimizer steps. tokens: of the whole run, padding left out. peak_bytes: an estimate, of each process;
    None where it could not be found, and unplanned says why.
    """

    steps: int
    steps_an_epoch: int
    tokens: int
    peak_bytes: int | None
    unplanned: str = ""

    def with_adapters(self, model: nn.Module, count: int) -> Plan:
        """The plan with so many adapters more, each as large as the one on `model`: values, gradients, moments."""
        if self.peak_bytes is None:
            return self
        size = sum(4 * p.nbytes for p in model.parameters() if p.requires_grad)
        return replace(self, peak_bytes=self.peak_bytes + count * size)


def length_of(rows: int, schedule: Schedule, processes: int = 1) -> tuple[int, int]:
    """The steps of an epoch over so many rows, and those of the run, as Trainer counts them, with the same rounding.

    processes: how many take their share of the rows.
    """
    batches = math.ceil(rows / (schedule.batch_size * processes))
    steps_an_epoch = max(1, math.ceil(batches / schedule.gradient_accumulation_steps))
    return steps_an_epoch, schedule.max_steps or math.ceil(steps_an_epoch * schedule.epochs)


def make_plan(model: nn.Module, loss: Callable[[], Tensor], schedule: Schedule, *, rows: int, tokens: int) -> Plan:
    """Plan for a model of fake tensors, adapted and in the mode that it will be trained in.

    loss: computes it for the largest batch, as training will. rows, tokens: in the training data; of several runs in
    one pass, the rows of the longest, and the tokens of all. Under torchrun each process takes its share of the rows.
    """
    steps_an_epoch, steps = length_of(rows, schedule, processes())
    seen = round(tokens * steps / steps_an_epoch)
    try:
        # torch logs the traceback of what fake tensors cannot do before it raises it.
        with mock.patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True):
            step = step_storages(model, loss, schedule.gradient_accumulation_steps)
    except Exception as error:  # whatever a model does that fake tensors cannot: the run itself may be fine
        why = ": ".join([type(error).__name__, *str(error).splitlines()[:1]])
        return Plan(steps, steps_an_epoch, seen, None, unplanned=why)
    weights = sum(p.nbytes for p in itertools.chain(model.parameters(), model.buffers()))
    moments = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's
    held = 0
    if next(model.parameters()).device.type == "cpu":
        held = resident_memory() + margin(step.in_heap)
    return Plan(steps, steps_an_epoch, seen, weights + moments + step.living + held)


def processes() -> int:
    """How many take their share of the rows: more than one under torchrun and `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))
