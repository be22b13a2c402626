"""What a run will take, told before it starts: steps, peak memory, time.

The memory is counted, not guessed: `memory.py` runs one training step on the model built of fake tensors and notes
every storage. To its peak come the weights, the optimizer's moments and, on a CPU, what the process holds before a
model is loaded (interpreter, libraries, data). What loading the model takes for itself is not counted.

The time is the arithmetic of a step divided by the speed of one product measured on the device: a rough figure, printed
as one.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn

from .memory import glibc_peak, live_peak, on_glibc, resident_memory, step_storages

# Share of a step's time that is not matrix products (norms, softmax, the optimizer), seen on CPU and GPU alike.
_OVERHEAD = 1.6


@dataclass(frozen=True)
class Plan:
    """steps: optimizer steps. tokens: of the whole run, padding left out. peak_bytes, seconds: estimates, of each
    process. peak_bytes is None where it could not be found, and unplanned says why.
    """

    steps: int
    tokens: int
    peak_bytes: int | None
    seconds: float
    unplanned: str = ""


def make_plan(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    rows: int,
    tokens: int,
    batch_size: int,
    accumulation: int,
    epochs: float,
    max_steps: int | None,
    rate: float,
    checkpointing: bool = False,
) -> Plan:
    """Plan for a model of fake tensors, adapted and in the mode that it will be trained in.

    loss: computes it for the largest batch, as training will. rows, tokens: in the training data. rate: the device's
    `speed`. Under torchrun each process takes its share of the rows.
    """
    steps_an_epoch = math.ceil(math.ceil(rows / (batch_size * processes())) / accumulation)
    steps = max_steps or math.ceil(steps_an_epoch * epochs)
    seen = round(tokens * steps / steps_an_epoch)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    # The forward pass, again where it is checkpointed, and the gradient of the inputs; frozen weights get no gradient.
    operations = (6 if checkpointing else 4) * matrices * seen / processes()
    seconds = _OVERHEAD * operations / rate
    try:
        # torch logs the traceback of what fake tensors cannot do before it raises it.
        with mock.patch.object(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True):
            step = step_storages(model, loss, accumulation)
    except Exception as error:  # whatever a model does that fake tensors cannot: the run itself may be fine
        return Plan(steps, seen, None, seconds, unplanned=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    weights = sum(p.nbytes for p in itertools.chain(model.parameters(), model.buffers()))
    moments = sum(2 * p.nbytes for p in model.parameters() if p.requires_grad)  # AdamW's
    if next(model.parameters()).device.type != "cpu":
        return Plan(steps, seen, weights + moments + live_peak(step), seconds)
    peak = glibc_peak(step) if on_glibc() else live_peak(step)
    return Plan(steps, seen, resident_memory() + weights + moments + peak, seconds)


def processes() -> int:
    """How many take their share of the rows: more than one under torchrun and `accelerate launch`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speed(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of one matrix product on `device`."""
    size = 4096 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(4):
        began = time.perf_counter()
        c = a @ b
        float(c[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
