"""What `lorakit train --auto 30m` searches, and what it may spend: a time, or a number of runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..core.errors import LoraError
from ..core.init import looks_at_weight
from ..core.numbers import seconds_in
from .config import TrainConfig, is_given
from .ladder import rung
from .settings import UsageError
from .sweep_settings import refuse_chosen, setting_name

AXES = ("learning_rate", "rank")
_START = 3e-4  # the rung next to the default of --learning-rate
_STRONGER = 1e-4  # for an update that moves faster: scaled by α/√r, or with factors of the weight itself (PiSSA)
_FACTOR = 4  # between neighbouring ranks
_RANKS = 1, 256  # the lowest and the highest that are tried
_RATES = 1e-6, 1.0


@dataclass(frozen=True)
class Budget:
    """A number of runs, or seconds of training."""

    text: str
    runs: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, text: str) -> Budget:
        """Raises UsageError for a text that is neither, and for a single run, which is no search."""
        if found := re.fullmatch(r"(\d+) ?runs?", text.strip()):
            if int(found[1]) < 2:
                raise UsageError(f"--auto {text!r}: a search needs at least 2 runs.")
            return cls(text, runs=int(found[1]))
        try:
            return cls(text, seconds=seconds_in(text))
        except LoraError as error:
            raise UsageError(f"--auto: {error}; a number of runs, such as '12 runs', is a budget too.") from None


class Candidate(NamedTuple):
    """A setting of the search. The order matters: of equally good ones the smaller rank is the better."""

    rank: int
    learning_rate: float


@dataclass(frozen=True)
class AutoSearch:
    """axes: the settings that are searched; the others are given. at_once: adapters in one pass, at most: the start and
    two neighbours, or fewer where memory is short; one if a batch cannot serve several.
    """

    budget: Budget
    start: Candidate
    axes: tuple[str, ...]
    at_once: int = 3

    @property
    def moves(self) -> list[Callable[[Candidate, int], Candidate | None]]:
        """The axes of the walk, see `ladder.untried`."""
        return [{"learning_rate": _of_rate, "rank": _of_rank}[name] for name in self.axes]

    @property
    def largest(self) -> int:
        """The rank for which memory is planned: that of the start, or its higher neighbour if ranks are searched."""
        return self.start.rank * (_FACTOR if "rank" in self.axes else 1)

    @property
    def passes(self) -> int:
        """How many candidates the first passes over all axes have: the start, and two neighbours on each."""
        return 1 + 2 * len(self.axes)

    def name(self, candidate: Candidate) -> str:
        """What is searched, as in `--sweep`: "learning_rate=0.0003 rank=16"."""
        return setting_name({name: getattr(candidate, name) for name in self.axes})

    def settings(self, config: TrainConfig, candidate: Candidate) -> TrainConfig:
        """The settings of a run with this candidate. α is the same for each rank."""
        return dataclasses.replace(config, auto=None, **candidate._asdict())


def auto_search(config: TrainConfig) -> AutoSearch | None:
    """What a run searches; None without --auto. Raises UsageError for settings that it cannot be combined with."""
    if config.auto is None:
        return None
    if config.sweep is not None:
        raise UsageError("--auto chooses what to try, and --sweep says it: give one of them.")
    refuse_chosen(config, "--auto")
    axes = tuple(name for name in AXES if not is_given(config, name))
    if not axes:
        raise UsageError(
            "--auto searches the learning rate and the rank, and both are given. Leave out --learning-rate or --rank, "
            "or --auto."
        )
    faster = config.rslora or looks_at_weight(config.init)
    rate = (_STRONGER if faster else _START) if "learning_rate" in axes else config.learning_rate
    return AutoSearch(Budget.of(config.auto), Candidate(config.rank, rate), axes)


def _of_rate(candidate: Candidate, by: int) -> Candidate | None:
    rate = rung(candidate.learning_rate, by)
    return candidate._replace(learning_rate=rate) if _RATES[0] <= rate <= _RATES[1] else None


def _of_rank(candidate: Candidate, by: int) -> Candidate | None:
    rank = candidate.rank * _FACTOR if by > 0 else candidate.rank // _FACTOR
    return candidate._replace(rank=rank) if _RANKS[0] <= rank <= _RANKS[1] else None
