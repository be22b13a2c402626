"""Several settings trained in one pass over the data: `lorakit train --sweep "learning_rate=1e-4,3e-4 rank=4,16"`.

Each combination of the values is an adapter of its own in a `Bank`, with its own learning rate, rank and optimizer
state, and starts from the factors that the seed gives it alone. All of them learn the same rows in the same order; see
`one_pass.py`.

The best one has the lowest held-out loss, or without held-out rows the lowest last loss. The run then ends as if it
had been trained alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..bank.bank import Bank
from ..core.errors import LoraError
from ..core.numbers import short_number
from ..core.settings import LoRASettings
from ..core.table import Table
from . import report
from .config import TrainConfig
from .one_pass import OnePassTrainer

FILE, FOLDER = "sweep.json", "sweep"


def bank_of(model: nn.Module, choices: Mapping[str, TrainConfig]) -> Bank:
    """A bank with a fresh adapter for each of the choices, on a frozen model. Each begins as it would alone."""
    model.requires_grad_(False)
    bank, state = Bank(model), torch.get_rng_state()
    for name, config in choices.items():
        torch.set_rng_state(state)
        bank[name] = dataclasses.replace(LoRASettings.of(config), dtype=None)
        bank.seeds[name] = 0  # the masks that each would draw alone
    return bank


def best_of(trainer: OnePassTrainer) -> str:
    """The name of the best adapter."""
    scores = trainer.heldout or trainer.last
    best = min(scores, key=lambda name: scores[name])
    if not math.isfinite(scores[best]):
        raise LoraError("no adapter of the sweep has a finite loss; lower the learning rates.")
    return best


def write_sweep(trainer: OnePassTrainer, bank: Bank, best: str, folder: Path) -> str:
    """Write every adapter into the folder, and what each reached. Returns the table, best first."""
    scores = trainer.heldout or trainer.last
    ranked = sorted(scores, key=lambda name: scores[name])
    rows: list[dict[str, Any]] = []
    for name in ranked:
        fate = f"diverged at step {trainer.diverged[name]}" if name in trainer.diverged else ""
        rows.append({"name": name, "loss": trainer.last.get(name), "heldout": trainer.heldout.get(name), "fate": fate})
        if not fate:
            bank[name].save(folder / FOLDER / name.replace(" ", ","))
    finite = [{key: value if value != math.inf else None for key, value in row.items()} for row in rows]
    (folder / FILE).write_text(json.dumps({"best": best, "rows": finite}, indent=1) + "\n", encoding="utf-8")
    table = Table(
        ("", "last loss", "held-out loss", " "),
        tuple((row["name"], _cell(row["loss"]), _cell(row["heldout"]), row["fate"]) for row in rows),
        left=frozenset({0, 3}),
    )
    return "\n".join((report.heading("sweep"), *table.lines(), f"best: {best}"))


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else short_number(value, 4)
