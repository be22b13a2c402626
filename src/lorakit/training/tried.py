"""What several settings came to, for `--sweep` and `--auto`: a JSON file, and the table that is printed and shown.

    {"best": "learning_rate=0.001 rank=4",
     "rows": [{"name": "learning_rate=0.001 rank=4", "steps": 60, "loss": 0.21, "heldout": 0.34, "fate": ""},
              {"name": "learning_rate=0.01 rank=4", "steps": 60, "loss": null, "heldout": null,
               "fate": "diverged at step 7"}]}

The rows of most steps come first, and of these the best: losses after fewer steps are not comparable with theirs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.numbers import short_number
from ..core.table import Table


@dataclass(frozen=True)
class Trial:
    """One setting that was trained. loss: the last training loss; heldout: the held-out loss at the end, None without
    held-out rows. Both are infinite if it diverged, and fate says when.
    """

    name: str
    steps: int
    loss: float | None
    heldout: float | None
    fate: str = ""

    @property
    def score(self) -> float:
        """What it is judged by: the held-out loss, or without held-out rows the training loss."""
        found = self.loss if self.heldout is None else self.heldout
        return math.inf if found is None else found


@dataclass(frozen=True)
class Tried:
    """All settings that were trained, and the name of the best one. told: a sentence on how they came about."""

    best: str
    trials: tuple[Trial, ...]
    told: str = ""

    @classmethod
    def of(cls, best: str, trials: Iterable[Trial], told: str = "") -> Tried:
        return cls(best, tuple(sorted(trials, key=lambda trial: (-trial.steps, trial.score))), told)

    @property
    def choice(self) -> str:
        """Sentences on what chose the best one."""
        return f"The {self.chosen_by} chose {self.best}." + (f" {self.told}" if self.told else "")

    @property
    def by_heldout(self) -> bool:
        """Whether the held-out loss chose the best one. Without held-out rows it was the training loss."""
        return any(trial.heldout is not None for trial in self.trials)

    @property
    def chosen_by(self) -> str:
        return "held-out loss" if self.by_heldout else "training loss"

    def table(self) -> Table:
        rows = tuple((one.name, str(one.steps), _cell(one.loss), _cell(one.heldout), one.fate) for one in self.trials)
        names = [trial.name for trial in self.trials]
        heldout = "held-out loss" if self.by_heldout else ""
        return Table(
            ("settings", "steps", "training loss", heldout, ""),
            rows,
            left=frozenset({0, 4}),
            marked=frozenset({(names.index(self.best), 3 if self.by_heldout else 2)}),
        )

    def as_json(self, **more: Any) -> str:
        rows = [
            {key: None if value == math.inf else value for key, value in dataclasses.asdict(trial).items()}
            for trial in self.trials
        ]
        return json.dumps({"best": self.best, **more, "rows": rows}, indent=1) + "\n"


def _cell(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else short_number(value, 4)
