"""Several settings trained in one pass over the data: `lorakit train --sweep "learning_rate=1e-4,3e-4 rank=4,16"`.

Each combination of the values is an adapter of its own in a `Bank`, with its own learning rate, rank and optimizer
state, and starts from the factors that the seed gives it alone. All of them learn the same rows in the same order; see
`one_pass.py`.

The best one has the lowest held-out loss, or without held-out rows the lowest last loss. The run then ends as if it
had been trained alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from ..bank.bank import Bank
from ..core.settings import LoRASettings
from .config import TrainConfig
from .divergence import Diverged
from .tried import Trial, Tried

FILE, FOLDER = "sweep.json", "sweep"


def frozen_bank(model: nn.Module) -> Bank:
    """A bank without adapters, on a frozen model."""
    model.requires_grad_(False)
    return Bank(model)


def add_fresh(bank: Bank, choices: Mapping[str, TrainConfig]) -> None:
    """Add a fresh adapter for each of the choices. Each begins as it would alone: all from the present random state."""
    state = torch.get_rng_state()
    for name, config in choices.items():
        torch.set_rng_state(state)
        bank[name] = dataclasses.replace(LoRASettings.of(config), dtype=None)
        bank.seeds[name] = 0  # the masks that each would draw alone


def best_of(trials: Mapping[str, Trial]) -> str:
    """The name of the best adapter."""
    best = min(trials, key=lambda name: trials[name].score)
    if not math.isfinite(trials[best].score):
        raise Diverged(f"all {len(trials)} adapters of the sweep diverged; lower the learning rates.")
    return best


def lines_of(history: Iterable[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """What was logged of one adapter, as lines of metrics.jsonl of a run alone."""
    losses = {f"loss {name}": "loss", f"eval_loss {name}": "eval_loss"}
    return [
        {losses.get(key, key): value for key, value in line.items() if key in ("step", "epoch", "seconds", *losses)}
        for line in history
    ]


def write_sweep(tried: Tried, bank: Bank, folder: Path) -> None:
    """Write every adapter that did not diverge into the folder, and what each reached."""
    for trial in tried.trials:
        if not trial.fate:
            bank[trial.name].save(folder / FOLDER / trial.name.replace(" ", ","))
    (folder / FILE).write_text(tried.as_json(), encoding="utf-8")
