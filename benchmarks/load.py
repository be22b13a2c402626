"""The cost of importing, loading and removing an adapter, compared with PEFT.

    python benchmarks/load.py        about two minutes

import: seconds beyond `import torch`, in new interpreters. load: loading an adapter of 100 modules, rank 16, from
PEFT's folder into a model and removing it, divided by reading the file's bytes with safetensors. rounds: memory of the
process after 1,000 rounds of load and detach, minus that after the first hundred.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import measure
import peft
import safetensors.torch
import torch
from torch import nn

import lorakit

MODULES, WIDTH, ROUNDS = 100, 512, 1000


def model() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({f"layer{i}": nn.Linear(WIDTH, WIDTH) for i in range(MODULES)})


def saved(folder: Path) -> None:
    """Save an adapter of all modules in PEFT's format, with B not zero."""
    net = model()
    lorakit.attach(net, "layer*", rank=16)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    lorakit.save(net, folder)


def import_seconds(package: str, times: int = 5) -> float:
    """The shortest time in several new interpreters, with torch already imported.

    lorakit imports lazily, so its main functions are looked up too.
    """
    used = "lorakit.attach; lorakit.save; lorakit.load" if package == "lorakit" else "peft.LoraConfig"
    script = (
        "import torch, time, warnings; warnings.simplefilter('ignore'); began = time.perf_counter();"
        f"import {package}; {used}; print(time.perf_counter() - began)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True) for _ in range(times)
    ]
    return min(float(run.stdout) for run in runs)


def load_times(folder: Path) -> dict[str, float]:
    file = folder / "adapter_model.safetensors"
    mine, theirs = model(), model()

    def with_lorakit() -> None:
        lorakit.load(mine, folder)
        lorakit.detach(mine)

    def with_peft() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(theirs, str(folder)).unload()

    def read() -> None:
        # clone touches every byte: the file is only mapped into memory
        for tensor in safetensors.torch.load_file(file).values():
            tensor.clone()

    return measure.minima({"read": read, "lorakit": with_lorakit, "PEFT": with_peft}, seconds=2.0)


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def growth(folder: Path) -> int:
    """The bytes by which memory grows from ROUNDS / 10 rounds of load and detach to ROUNDS rounds."""
    net = model()
    early = 0
    for index in range(ROUNDS):
        lorakit.load(net, folder)
        lorakit.detach(net)
        if index == ROUNDS // 10:
            early = resident()
    return resident() - early


def main() -> None:
    rows: list[dict[str, Any]] = []
    for package, name in (("lorakit", "lorakit"), ("peft", "PEFT")):
        rows.append(
            {"what": "import, seconds over torch's", "library": name, "value": round(import_seconds(package), 3)}
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        saved(folder)
        modules = len(json.loads((folder / "adapter_config.json").read_text())["target_modules"])
        times = load_times(folder)
        for name in ("lorakit", "PEFT"):
            what = f"load {modules} modules and let go, over reading the file"
            rows.append({"what": what, "library": name, "value": round(times[name] / times["read"], 1)})
        if Path("/proc/self/statm").exists():
            what = f"memory after {ROUNDS} rounds over that after {ROUNDS // 10}, MB"
            rows.append({"what": what, "library": "lorakit", "value": round(growth(folder) / 1e6, 2)})
    measure.print_table(rows)
    measure.write("load", "python benchmarks/load.py", rows)


if __name__ == "__main__":
    main()
