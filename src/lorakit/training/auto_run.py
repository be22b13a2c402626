"""The search of `--auto` as passes over the data: the candidates of a pass are adapters in a bank, as in a sweep.

Each candidate begins from the same random state and sees the same rows, as a run alone would. Of the candidates that
were trained on all steps the best one is kept; in the end it is the result, so that it is not trained again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..core.numbers import duration
from ..formats.folder import OutputFolder
from . import report
from .auto import Runs, Seconds, found
from .auto_settings import AutoSearch, Candidate
from .config import TrainConfig
from .fitting import Chosen, on_all_rows, put_on, together
from .ladder import best_tried
from .models import Loaded
from .pace import Pace
from .prepare import Prepared
from .processes import say
from .progress import Progress
from .sweep import add_fresh, frozen_bank, lines_of
from .tried import Trial, Tried

FILE = "auto.json"
_ENOUGH = 10**6  # steps: timing ends before


def train_searched(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
) -> tuple[Progress, Chosen]:
    """Train what `--auto` tries, and put the best adapter on the model."""
    assert prepared.search is not None
    return _Searched(prepared, prepared.search, loaded, folder, record).result()


class _Searched:
    def __init__(
        self, prepared: Prepared, search: AutoSearch, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
    ) -> None:
        self._prepared, self._search = prepared, search
        self._loaded, self._folder, self._record = loaded, folder, record
        self._bank, self._state = frozen_bank(loaded.model), torch.get_rng_state()
        self._trials: list[Trial] = []
        self._passes: list[Progress] = []
        # Those that were trained on all steps: what they came to, and what was logged meanwhile.
        self._whole: dict[Candidate, tuple[Trial, Progress]] = {}

    def result(self) -> tuple[Progress, Chosen]:
        search, budget = self._search, self._search.budget
        purse: Runs | Seconds
        if budget.seconds is None:
            purse = Runs(budget.runs or 0)
        else:
            purse = Seconds(budget.seconds)
            purse.plan(self._seconds_of_a_run(), search.passes)
        best, ended = found(search, purse, self._train)
        name, spent = search.name(best), purse.spent()
        tried = Tried.of(name, self._trials)
        with self._folder.writing() as part:
            text = tried.as_json(budget=budget.text, spent=spent, ended=ended)
            (part / FILE).write_text(text, encoding="utf-8")
        chosen = put_on(self._loaded, self._bank, search.settings(self._prepared.config, best), tried)
        say(f"{spent} are spent; the search is over: {ended}")
        return self._progress(best), chosen

    def _train(self, candidates: Sequence[Candidate], share: float) -> dict[Candidate, Trial]:
        steps = max(1, round(share * self._prepared.plan.steps))
        choices = self._added(candidates)
        say("\n".join((report.heading(f"{steps} steps with each of these"), *choices)))
        prepared = self._prepared if share == 1 else _of_steps(self._prepared, steps)
        runs = on_all_rows(prepared, choices)
        with together(prepared, self._loaded, self._folder, self._record, self._bank, runs) as (trainer, progress):
            trainer.train()
        trials = {candidate: trainer.trials[self._search.name(candidate)] for candidate in candidates}
        self._trials += trials.values()
        self._passes.append(progress)
        if share == 1:
            self._whole |= {candidate: (trial, progress) for candidate, trial in trials.items()}
        self._keep_best()
        return trials

    def _keep_best(self) -> None:
        """Remove all adapters from the bank but the best of those that were trained on all steps."""
        best = best_tried({candidate: trial.score for candidate, (trial, _) in self._whole.items()})
        for name in [name for name in self._bank if best is None or name != self._search.name(best)]:
            del self._bank[name]

    def _added(self, candidates: Sequence[Candidate]) -> dict[str, TrainConfig]:
        """Fresh adapters in the bank, with the settings of these candidates."""
        torch.set_rng_state(self._state)
        settings = self._prepared.config
        choices = {self._search.name(candidate): self._search.settings(settings, candidate) for candidate in candidates}
        add_fresh(self._bank, choices)
        return choices

    def _seconds_of_a_run(self) -> float:
        """Train the start for a few steps, and take its adapter away again."""
        config, plan = self._prepared.config, self._prepared.plan
        choices = self._added([self._search.start])
        silent = dataclasses.replace(self._prepared, config=dataclasses.replace(config, report_to=None))
        part = _of_steps(silent, _ENOUGH)
        runs = on_all_rows(part, choices)
        with together(part, self._loaded, self._folder, self._record, self._bank, runs) as (trainer, progress):
            pace = trainer.pace
            assert pace is not None
            trainer.remove_callback(progress)
            trainer.add_callback(_UntilTimed(pace))
            trainer.args.eval_strategy = IntervalStrategy.NO
            trainer.train()
        self._keep_best()
        seconds = pace.rest(plan.steps, math.ceil(plan.steps / (config.eval_steps or plan.steps_an_epoch)))
        assert seconds is not None
        say(f"about {duration(seconds)} for each run of {plan.steps} steps and its held-out losses")
        return seconds

    def _progress(self, best: Candidate) -> Progress:
        """What was logged of the best one, and what all passes together took."""
        _, progress = self._whole[best]
        progress.become(lines_of(progress.history, self._search.name(best)))
        progress.seconds = sum(one.seconds for one in self._passes)
        progress.peak_bytes = max(one.peak_bytes for one in self._passes)
        progress.loading_bytes = self._passes[0].loading_bytes
        return progress


class _UntilTimed(TrainerCallback):
    """Ends training as soon as the pace is known."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pace.step_begins()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._pace.step_ends()
        if self._pace.rest(1, 0) is not None:
            control.should_training_stop = True


def _of_steps(prepared: Prepared, steps: int) -> Prepared:
    return dataclasses.replace(prepared, config=dataclasses.replace(prepared.config, max_steps=steps))
