"""Folding an adapter into a model's files: how fast, against copying the files.

    python benchmarks/merge_files.py [--layers 24] [--folder FOLDER]      minutes; 8 GB free in FOLDER

A Llama of random weights lies in six files, which the system has in its cache. In turns they are copied, copied
and synced to the disk, and merged with an adapter of rank 16 on every linear layer. A merge syncs what it writes before
the folder appears, and reads rows of each tensor again, so the synced copy is its floor.

GB/s: bytes of the files over the shortest time. over …: the merge's time as a ratio to that of the copy.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit.formats.files import sync


def made(folder: Path, dtype: torch.dtype, layers: int) -> int:
    """Write base and adapter into the folder. Returns the bytes of the base's files."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).to(dtype)
    total = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder / "base", max_shard_size=total // 6)
    lorakit.attach(model, rank=16)
    with torch.no_grad():
        for parameter in lorakit.parameters(model):
            parameter.normal_(std=0.01)
    lorakit.save(model, folder / "adapter")
    return sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))


def row(dtype: torch.dtype, layers: int, where: str | None, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        size = made(folder, dtype, layers)

        def copied(target: str) -> None:
            subprocess.run(["cp", "-r", folder / "base", folder / target], check=True)

        def synced() -> None:
            copied("synced")
            sync(folder / "synced")

        steps: dict[str, Callable[[], Any]] = {
            "cp": lambda: copied("cp"),
            "cp and sync": synced,
            "merge": lambda: lorakit.merge_files(folder / "base", folder / "adapter", folder / "merge"),
        }

        def clock(step: Callable[[], Any]) -> float:
            for target in ("cp", "synced", "merge"):
                shutil.rmtree(folder / target, ignore_errors=True)
            os.sync()  # what an earlier turn wrote is no part of this one
            return measure.wall_seconds(step)

        times = measure.minima(steps, seconds=seconds, least=5, clock=clock)
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch."), "GB": round(size / 1e9, 2)}
    found |= {f"GB/s {name}": round(size / time / 1e9, 2) for name, time in times.items()}
    return found | {f"over {name}": round(times["merge"] / times[name], 2) for name in ("cp", "cp and sync")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=24, help="of the model: 24 are 1.8 GB in float32")
    parser.add_argument(
        "--folder", help="where the files lie, on the disk that is measured (default: the system's own)"
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for each of the three")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"
    rows = [row(dtype, args.layers, args.folder, args.seconds) for dtype in (torch.float32, torch.bfloat16)]
    measure.print_table(rows)
    measure.write("merge_files", f"python benchmarks/merge_files.py --layers {args.layers}", rows)


if __name__ == "__main__":
    main()
