"""Several settings trained on the same rows, for `--sweep` and `--auto`: in one pass, or one after another.

One pass is much faster, but one batch cannot serve all settings: a classifier's head is trained whole, and so are
biases; DoRA scales the whole output. There each setting has a pass of its own (`Prepared.one_pass`). Either way each is
an adapter of a bank and becomes what it would become alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..formats.folder import OutputFolder
from .config import TrainConfig
from .divergence import Diverged
from .fitting import add_fresh, alone, at_once, frozen_bank
from .models import Loaded
from .outcome import last_losses, lines_of
from .own_run import OwnRun
from .prepare import Prepared
from .progress import Progress
from .tried import Trial


@dataclass
class Trained:
    """What was trained. trials: what each setting came to; lines: what was logged of each, as of a run alone. seconds,
    peak_bytes: of all of them.
    """

    trials: dict[str, Trial] = field(default_factory=dict)
    lines: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    seconds: float = 0.0
    peak_bytes: int = 0

    def progress(self, folder: Path, name: str) -> Progress:
        """As of a run with these settings alone, with metrics.jsonl; the time and the peak are those of all."""
        found = Progress(folder)
        found.become(self.lines[name])
        found.seconds, found.peak_bytes = self.seconds, self.peak_bytes
        return found


class Candidates:
    """The adapters of a bank on the loaded model, each of which is trained with settings of its own."""

    def __init__(self, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]) -> None:
        self.bank = frozen_bank(loaded.model)
        self._loaded, self._folder, self._record = loaded, folder, record

    def add(self, prepared: Prepared, choices: Mapping[str, TrainConfig]) -> None:
        """Add a fresh adapter for each of the choices, by its name."""
        add_fresh(self.bank, {name: prepared.settings_on(self._loaded.model, own) for name, own in choices.items()})

    def train(self, prepared: Prepared, choices: Mapping[str, TrainConfig]) -> Trained:
        """Train the adapters of these names, each with its settings, on the rows and for the steps of `prepared`."""
        found = Trained()
        for own in [choices] if prepared.one_pass else [{name: config} for name, config in choices.items()]:
            with self.trainer_of(prepared, own) as (trainer, progress):
                if prepared.one_pass:
                    trainer.train()
                    found.trials |= trainer.trials
                    found.lines |= {name: lines_of(progress.history, name) for name in own}
                else:
                    (name,) = own
                    found.trials[name] = _trial(trainer, name)
                    found.lines[name] = progress.history
            found.seconds += progress.seconds
            found.peak_bytes = max(found.peak_bytes, progress.peak_bytes)
        return found

    @contextmanager
    def trainer_of(self, prepared: Prepared, choices: Mapping[str, TrainConfig]) -> Iterator[tuple[Any, Progress]]:
        """The trainer of one pass over the choices, of which there is only one without `Prepared.one_pass`."""
        common = self._loaded, self._folder, self._record, self.bank
        if prepared.one_pass:
            with at_once(prepared, *common, _on_all_rows(prepared, choices)) as found:
                yield found
            return
        ((name, config),) = choices.items()
        given = prepared.config
        config = dataclasses.replace(config, max_steps=given.max_steps, report_to=given.report_to)
        with alone(dataclasses.replace(prepared, config=config), *common, name) as found:
            yield found


def _on_all_rows(prepared: Prepared, choices: Mapping[str, TrainConfig]) -> dict[str, OwnRun]:
    """A run for each of the choices, all on the same rows and for as many steps as the run is prepared for."""
    return {
        name: OwnRun(
            dataclasses.replace(own, max_steps=prepared.config.max_steps),
            own.learning_rate,
            own.seed,
            prepared.train,
            prepared.valid,
        )
        for name, own in choices.items()
    }


def _trial(trainer: Any, name: str) -> Trial:
    """Train one adapter by itself, and say what it came to."""
    try:
        trainer.train()
        trainer.refuse_diverged()
    except Diverged:
        step = trainer.state.global_step
        return Trial(name, step, math.inf, math.inf, f"diverged at step {step + (step < trainer.state.max_steps)}")
    last = last_losses(trainer.state.log_history)
    return Trial(name, trainer.state.global_step, last.get("training"), last.get("held-out"))
