"""The layers of Llama-3-8B on one GPU, forward and backward in bfloat16: time and memory against the frozen layer.

    python benchmarks/gpu.py            under eight minutes; writes results/<name of the GPU>.json
    python benchmarks/gpu.py --quick    two rows, not written to a file

time: ratio to the floor, which is the frozen layer whose input needs a gradient. Times are minima by CUDA events, with
the variants taking turns. "without kernels" is lorakit with LORAKIT_KERNELS=0. kept:
bytes kept for the backward pass, divided by the bytes of the input. peak: the most memory that a step takes beyond the
floor's step, divided by the bytes of the input. TFLOP/s are the floor's.

Without a GPU every number is "not measured".
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import layer
import measure
import torch
from torch import Tensor

SHAPES = {
    "q, o": (4096, 4096),
    "k, v": (4096, 1024),
    "gate, up": (4096, 14336),
    "down": (14336, 4096),
}
ROWS = list(product(SHAPES, (4096, 16384), (16, 64), (0.0, 0.05)))
QUICK = [("k, v", 4096, 16, 0.05), ("q, o", 4096, 16, 0.05)]
ADAPTED = ["lorakit", "without kernels", "PEFT", "loralib"]
MEASURED = [f"{what} {name}" for what in ("time", "kept", "peak") for name in ADAPTED] + ["TFLOP/s"]
NO_GPU = "not measured: no GPU at hand"
NOT_INSTALLED = "not installed"


class EventClock:
    """Seconds of a step between two CUDA events, after writing sixteen gigabytes to memory.

    The writing empties the L2 cache and takes some milliseconds. In that time the host runs ahead of the device, as in
    training, so the device's work is timed and not its launch.
    """

    def __init__(self) -> None:
        self.ballast = torch.empty(2**30, dtype=torch.uint8, device="cuda")

    def __call__(self, step: Callable[[], Any]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(16):
            self.ballast.zero_()
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


def without_kernels(step: Callable[[], Tensor]) -> Tensor:
    os.environ["LORAKIT_KERNELS"] = "0"
    try:
        return step()
    finally:
        del os.environ["LORAKIT_KERNELS"]


def peak_bytes(step: Callable[[], Any], x: Tensor) -> int:
    """The peak of memory in use during the step, beyond what was in use before it."""
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measured(name: str, tokens: int, rank: int, dropout: float, clock: EventClock) -> dict[str, Any]:
    inputs, outputs = SHAPES[name]
    layers = layer.variants(inputs, outputs, torch.bfloat16, dropout, rank, "cuda")
    x = torch.randn(1, tokens, inputs, dtype=torch.bfloat16, device="cuda").requires_grad_()
    steps = layer.training_steps(layers, x)
    layers["without kernels"] = layers["lorakit"]
    steps["without kernels"] = partial(without_kernels, steps["lorakit"])
    # The first round, which is not timed, compiles and checks the kernels.
    times = measure.minima(steps, seconds=0.5, clock=clock)
    peaks = {key: peak_bytes(step, x) for key, step in steps.items()}
    size = x.numel() * x.element_size()
    forward = {key: partial(own, x) for key, own in layers.items()}
    forward["without kernels"] = partial(without_kernels, forward["lorakit"])
    kept = {key: measure.kept_bytes(forward[key], own.parameters()) for key, own in layers.items()}
    numbers: dict[str, Any] = dict.fromkeys(MEASURED, NOT_INSTALLED)
    for key in ADAPTED:
        if key in layers:
            numbers[f"time {key}"] = round(times[key] / times["floor"], 3)
            numbers[f"kept {key}"] = round(kept[key] / size, 3)
            numbers[f"peak {key}"] = round((peaks[key] - peaks["floor"]) / size, 3)
    return {**numbers, "TFLOP/s": round(4e-12 * tokens * inputs * outputs / times["floor"], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two rows, not written to a file")
    quick = parser.parse_args().quick
    os.environ.pop("LORAKIT_KERNELS", None)  # the caller may have set it
    clock = EventClock() if torch.cuda.is_available() else None
    rows = []
    for name, tokens, rank, dropout in QUICK if quick and clock else ROWS:
        row = {"layer": f"{name}: {SHAPES[name][0]} → {SHAPES[name][1]}", "tokens": str(tokens), "rank": str(rank)}
        numbers = measured(name, tokens, rank, dropout, clock) if clock else dict.fromkeys(MEASURED, NO_GPU)
        rows.append({**row, "dropout": str(dropout), **numbers})
    if clock:
        measure.print_table(rows)
    else:
        print(f"{len(rows)} rows, {NO_GPU}")
    if not (quick and clock):
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-") if clock else "gpu"
        measure.write(gpu, "python benchmarks/gpu.py", rows)


if __name__ == "__main__":
    main()
