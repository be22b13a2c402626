"""What the benchmarks share: interleaved minima, the bytes kept for a backward pass, tables, results with their origin.

Times are ratios to a floor measured in the same process, in turns with it: absolute times say nothing on a machine that
others use. The minimum of the turns is the one that was disturbed least.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def wall_seconds(step: Callable[[], Any]) -> float:
    """How long one step takes on the wall's clock."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def minima(
    steps: Mapping[str, Callable[[], Any]],
    seconds: float = 1.0,
    least: int = 7,
    clock: Callable[[Callable[[], Any]], float] = wall_seconds,
) -> dict[str, float]:
    """The shortest time of each step in seconds by `clock`, the steps taking turns for about that long each."""
    best: dict[str, float] = {}
    for step in steps.values():
        step()  # allocators and threads wake up
    started, turns = time.perf_counter(), 0
    while turns < least or time.perf_counter() - started < seconds * len(steps):
        for name, step in steps.items():
            best[name] = min(best.get(name, float("inf")), clock(step))
        turns += 1
    return best


def kept_bytes(forward: Callable[[], Any], constants: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, without those of `constants`."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # alive until the sum is taken: a freed storage's address may serve again
    own = {tensor.untyped_storage().data_ptr() for tensor in constants}
    total = sum(size for pointer, size in kept.items() if pointer not in own)
    del result
    return total


def print_table(rows: list[dict[str, Any]]) -> None:
    """One line for each row, columns in the order of the first."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [columns, *([_text(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def write(name: str, command: str, rows: list[dict[str, Any]]) -> None:
    """`results/<name>.json`: the rows, with the command, the commit and the machine that they come from."""
    RESULTS.mkdir(exist_ok=True)
    record = {"command": command, "commit": _commit(), "machine": machine(), "rows": rows}
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten: {path.relative_to(ROOT)}")


def machine() -> dict[str, Any]:
    """The processors, the threads in use and the versions that matter."""
    info = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    features = torch.backends.cpu.get_cpu_capability()
    gpu = {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda} if torch.cuda.is_available() else {}
    return {
        **gpu,
        "processor": models[0] if models else platform.processor(),
        "instructions": features,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def optional(name: str) -> ModuleType | None:
    """The library of that name, if it is installed: what is compared with what there is."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True).stdout.strip()
    return f"{head} with changes" if changed else head


def _text(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
