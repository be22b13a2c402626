"""The time to merge updates into weights, compared with copying the weights once.

    python benchmarks/merge.py        about a minute on one thread

copy GB/s: bytes read and written when the weight is copied. time: ratio to that copy, which is the lower limit for a
merge that keeps the original. The update of rank 16 is added in float32 and rounded once. loralib, and PEFT with
safe_merge=False, add in place and lose the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import layer
import measure
import torch
from torch import nn

SHAPES = [(576, 576), (576, 1536), (2048, 2048), (4096, 4096)]


def rounds(made: dict[str, nn.Module]) -> dict[str, Callable[[], Any]]:
    """A merge of each library's layer. It is undone if that costs nothing."""

    def mine() -> None:
        layer = made["lorakit"][0]  # type: ignore[index]
        layer.merge()
        layer.unmerge()  # puts the old weight back: no arithmetic

    def loralib() -> None:
        layer: Any = made["loralib"]
        layer.merged = False
        layer.train(False)

    def peft() -> None:
        layer: Any = made["PEFT"][0]  # type: ignore[index]
        layer.merged_adapters.clear()
        layer.merge()

    steps = {"lorakit": mine, "loralib": loralib, "PEFT": peft}
    return {name: step for name, step in steps.items() if name in made}


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for inputs, outputs in SHAPES:
            made = layer.variants(inputs, outputs, dtype, 0.0)
            weight = made["floor"].weight
            times = measure.minima({"copy": weight.clone, **rounds(made)}, seconds=0.5)
            row: dict[str, Any] = {"weight": f"{inputs} → {outputs}", "dtype": str(dtype).removeprefix("torch.")}
            row["copy GB/s"] = round(2 * weight.nbytes / times["copy"] / 1e9, 1)
            row |= {f"time {name}": round(times[name] / times["copy"], 2) for name in times if name != "copy"}
            rows.append(row)
    measure.print_table(rows)
    measure.write("merge", "python benchmarks/merge.py", rows)


if __name__ == "__main__":
    main()
