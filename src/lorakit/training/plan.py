"""What a run will take, told before it starts: steps, peak memory, time.

The memory is counted, not guessed: the model is built of fake tensors, which have shapes and no contents, one step's
forward pass runs on it, and every tensor that autograd keeps for the backward pass is added up. The time is the
arithmetic of a step divided by the speed of one product measured on the device: a rough figure, printed as one.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

# Share of a step's time that is not matrix products (norms, softmax, the optimizer), seen on CPU and GPU alike.
_OVERHEAD = 1.6
# What an interpreter with torch and transformers occupies before a model is loaded, on a CPU.
_PROCESS_BYTES = 700_000_000


@dataclass(frozen=True)
class Plan:
    """steps: optimizer steps. tokens: of the whole run, padding left out. peak_bytes, seconds: estimates."""

    steps: int
    tokens: int
    peak_bytes: int
    seconds: float


def make_plan(
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    rows: int,
    tokens: int,
    batch_size: int,
    accumulation: int,
    epochs: float,
    max_steps: int | None,
    rate: float,
) -> Plan:
    """Plan for a model of fake tensors, adapted as it will be.

    batch: the largest batch, of fake tensors. rows, tokens: in the training data. rate: the device's `speed`.
    """
    steps_an_epoch = math.ceil(math.ceil(rows / batch_size) / accumulation)
    steps = max_steps or math.ceil(steps_an_epoch * epochs)
    seen = round(tokens * steps / steps_an_epoch)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    # AdamW: a gradient and two moments beside each trained parameter
    training = sum(3 * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    kept = kept_bytes(model, lambda: model(**batch))
    process = _PROCESS_BYTES if next(model.parameters()).device.type == "cpu" else 0
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    # forward and the gradient of the inputs; the frozen weights get no gradient
    operations = 4 * matrices * seen
    seconds = _OVERHEAD * operations / rate
    return Plan(steps, seen, weights + training + kept + process, seconds)


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that `forward` keeps for its backward pass, each storage once and parameters left out."""
    seen = {p.untyped_storage()._cdata for p in model.parameters()}
    total = 0
    storages = []  # held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            storages.append(storage)
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return total


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


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point so far: of the process on a CPU, of the tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
