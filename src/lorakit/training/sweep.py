"""Several settings trained on the same rows: `lorakit train --sweep "learning_rate=1e-4,3e-4 rank=4,16"`.

Each combination of the values is an adapter of its own in a `Bank`, with its own learning rate, rank and optimizer
state, and starts from the factors that the seed gives it alone. All of them learn the same rows in the same order, in
one pass if a batch can serve them all; see `candidates.py`.

The best one has the lowest held-out loss, or without held-out rows the lowest last loss. The run then ends as if it
had been trained alone. OUT/sweep/NAME has each of the others too, with its settings and its lines of metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..formats.folder import OutputFolder
from .candidates import Candidates
from .config import TrainConfig
from .divergence import Diverged
from .fitting import Chosen, put_on
from .models import Loaded
from .prepare import Prepared
from .progress import Progress
from .sweep_settings import swept
from .tried import Trial, Tried

FILE, FOLDER = "sweep.json", "sweep"


def best_of(trials: Mapping[str, Trial]) -> str:
    """The name of the best adapter."""
    best = min(trials, key=lambda name: trials[name].score)
    if not math.isfinite(trials[best].score):
        raise Diverged(f"all {len(trials)} adapters of the sweep diverged; lower the learning rates.")
    return best


def train_swept(
    prepared: Prepared,
    loaded: Loaded,
    folder: OutputFolder,
    record: dict[str, Any],
    write_settings: Callable[[TrainConfig, Path], None],
) -> tuple[Progress, Chosen]:
    """Train all adapters of a sweep, write a folder for each, and put the best one on the model.

    write_settings: writes into a folder what a run with these settings is asked by.
    """
    choices, candidates = swept(prepared.config), Candidates(loaded, folder, record)
    candidates.add(prepared, choices)
    trained, bank = candidates.train(prepared, choices), candidates.bank
    best = best_of(trained.trials)
    tried = Tried.of(best, trained.trials.values())
    with folder.writing() as part:
        for trial in tried.trials:
            if not trial.fate:
                own = part / FOLDER / trial.name.replace(" ", ",")
                bank[trial.name].save(own)
                write_settings(choices[trial.name], own)
                trained.progress(own, trial.name)
        (part / FILE).write_text(tried.as_json(), encoding="utf-8")
    folder.add(FILE, FOLDER)
    return trained.progress(folder.path, best), put_on(loaded, bank, choices[best], tried)
