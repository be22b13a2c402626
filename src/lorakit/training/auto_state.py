"""What a search of `--auto` has come to so far, in a file, so that an interrupted one goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .auto_settings import Candidate
from .ladder import best_tried
from .tried import Trial


@dataclass
class SearchState:
    """trials: by the candidate and the share of the steps. kept: the best of those on all steps, of which `lines` were
    logged. seconds, peak_bytes: of training. taken: seconds of the budget.
    """

    trials: dict[tuple[Candidate, float], Trial] = field(default_factory=dict)
    kept: Candidate | None = None
    lines: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    taken: float = 0.0

    @classmethod
    def of(cls, path: Path) -> SearchState:
        said = json.loads(path.read_text(encoding="utf-8"))
        trials = {(Candidate(*candidate), share): Trial(**trial) for candidate, share, trial in said.pop("trials")}
        kept = said.pop("kept")
        return cls(trials, kept and Candidate(*kept), **said)

    def write(self, path: Path) -> None:
        trials = [(candidate, share, dataclasses.asdict(trial)) for (candidate, share), trial in self.trials.items()]
        said = {own.name: getattr(self, own.name) for own in dataclasses.fields(self)}
        path.write_text(json.dumps({**said, "trials": trials}, indent=1) + "\n", encoding="utf-8")

    def add(self, trials: Mapping[Candidate, Trial], share: float, seconds: float, peak_bytes: int) -> None:
        """Note what a pass came to."""
        self.seconds, self.peak_bytes = self.seconds + seconds, max(self.peak_bytes, peak_bytes)
        self.trials |= {(candidate, share): trial for candidate, trial in trials.items()}

    def best(self) -> Candidate | None:
        """The best of those that were trained on all steps and did not diverge."""
        whole = {candidate: trial.score for (candidate, share), trial in self.trials.items() if share == 1}
        return best_tried({candidate: score for candidate, score in whole.items() if math.isfinite(score)})
