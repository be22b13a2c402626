"""The search of `--auto` as passes over the data: the candidates of a pass are adapters in a bank, as in a sweep.

If a batch cannot serve several adapters, a pass has one candidate.
Each candidate begins from the same random state and sees the same rows, as a run alone would. Of the candidates that
were trained on all steps the best one is kept; in the end it is the result, so that it is not trained again. After each
pass this is written down, so that an interrupted search goes on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..core.numbers import duration
from ..formats.folder import OutputFolder
from . import report
from .auto import Runs, Seconds, best_within
from .auto_settings import AutoSearch, Candidate
from .auto_state import SearchState
from .candidates import Candidates, Trained
from .checkpoints import SEARCH, SEARCHED, search_in
from .config import TrainConfig
from .fitting import Chosen, put_on
from .models import Loaded
from .pace import Pace
from .prepare import Prepared
from .processes import say
from .progress import Progress
from .state_files import read_state, write_state
from .tried import Trial, Tried

FILE = "auto.json"
_ENOUGH = 10**6  # steps: timing ends before


def train_searched(
    prepared: Prepared, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
) -> tuple[Progress, Chosen]:
    """Train what `--auto` tries, and put the best adapter on the model. Goes on with a search that `folder` holds."""
    assert prepared.search is not None
    return _Searched(prepared, prepared.search, loaded, folder, record).result()


class _Searched:
    def __init__(
        self, prepared: Prepared, search: AutoSearch, loaded: Loaded, folder: OutputFolder, record: dict[str, Any]
    ) -> None:
        self._prepared, self._search = prepared, search
        self._loaded, self._folder = loaded, folder
        self._candidates, self._random = Candidates(loaded, folder, record), torch.get_rng_state()
        self._bank = self._candidates.bank
        self._state = SearchState()
        if (left := search_in(folder.path)) is not None:
            self._go_on(left)
        self._purse = self._filled()

    def result(self) -> tuple[Progress, Chosen]:
        search, state = self._search, self._state
        best, ended = best_within(search, self._purse, self._train, dict(state.trials))
        spent = self._purse.spent()
        told = f"The search used {spent} and ended because {ended}."
        tried = Tried.of(search.name(best), state.trials.values(), told)
        with self._folder.writing() as part:
            text = tried.as_json(budget=search.budget.text, spent=spent, ended=ended)
            (part / FILE).write_text(text, encoding="utf-8")
        chosen = put_on(self._loaded, self._bank, search.settings(self._prepared.config, best), tried)
        trained = Trained(lines={tried.best: state.lines}, seconds=state.seconds, peak_bytes=state.peak_bytes)
        return trained.progress(self._folder.path, tried.best), chosen

    def _filled(self) -> Runs | Seconds:
        budget, state = self._search.budget, self._state
        shares = [share for _, share in state.trials]
        if budget.seconds is None:
            assert budget.runs is not None
            return Runs(budget.runs, shares.count(1.0))
        purse = Seconds(budget.seconds, state.taken)
        run, share = self._seconds_of_a_run(), min(shares, default=None)
        purse.plan(run, self._search.passes, share, made=state.kept is not None)
        return purse

    def _train(self, candidates: Sequence[Candidate], share: float) -> dict[Candidate, Trial]:
        steps = max(1, round(share * self._prepared.plan.steps))
        choices = self._added(candidates)
        say("\n".join((report.heading(f"{steps} steps with each of these"), *choices)))
        prepared = self._prepared if share == 1 else _of_steps(self._prepared, steps)
        trained = self._candidates.train(prepared, choices)
        trials = {candidate: trained.trials[self._search.name(candidate)] for candidate in candidates}
        self._state.add(trials, share, trained.seconds, trained.peak_bytes)
        self._keep_best(trained)
        self._write()
        return trials

    def _keep_best(self, newest: Trained) -> None:
        """Remove all adapters from the bank but the best of those that were trained on all steps."""
        state, best = self._state, self._state.best()
        name = "" if best is None else self._search.name(best)
        if best != state.kept:
            state.kept, state.lines = best, newest.lines[name]
        for other in [other for other in self._bank if other != name]:
            del self._bank[other]

    def _write(self) -> None:
        state = self._state
        state.taken = self._purse.taken() if isinstance(self._purse, Seconds) else 0.0
        with self._folder.writing() as part:
            (part / SEARCH).mkdir()
            if state.kept is not None:
                self._bank.use(self._search.name(state.kept))
                write_state(self._loaded.model, part / SEARCH)
            state.write(part / SEARCH / SEARCHED)

    def _go_on(self, left: Path) -> None:
        self._state = SearchState.of(left / SEARCHED)
        if (kept := self._state.kept) is not None:
            self._added([kept])
            self._bank.use(self._search.name(kept))
            read_state(self._loaded.model, left)

    def _added(self, candidates: Sequence[Candidate]) -> dict[str, TrainConfig]:
        """Fresh adapters in the bank, with the settings of these candidates."""
        settings = self._prepared.config
        choices = {self._search.name(candidate): self._search.settings(settings, candidate) for candidate in candidates}
        torch.set_rng_state(self._random)
        self._candidates.add(self._prepared, choices)
        return choices

    def _seconds_of_a_run(self) -> float:
        """Train the start for a few steps, and take its adapter away again."""
        config, plan, name = self._prepared.config, self._prepared.plan, "timed"
        choices = {name: self._search.settings(config, self._search.start)}
        self._candidates.add(self._prepared, choices)
        silent = dataclasses.replace(self._prepared, config=dataclasses.replace(config, report_to=None))
        part = _of_steps(silent, _ENOUGH)
        with self._candidates.trainer_of(part, choices) as (trainer, progress):
            pace: Pace = trainer.pace
            trainer.remove_callback(progress)
            trainer.add_callback(_UntilTimed(pace))
            trainer.args.eval_strategy = IntervalStrategy.NO
            trainer.train()
        del self._bank[name]
        seconds = pace.rest(plan.steps, math.ceil(plan.steps / (config.eval_steps or plan.steps_an_epoch)))
        assert seconds is not None
        say(f"about {duration(seconds)} for each run of {plan.steps} steps and its held-out losses")
        return seconds


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
