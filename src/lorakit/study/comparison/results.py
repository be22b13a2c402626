"""The results of a comparison as plain data: runs, and the rows of a table that summarise them.

A `Run` is one training run and a line of OUT/runs.jsonl. A run whose key is already there is not made again. A row
summarises the runs of a method on a task over the seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...core.errors import LoraError
from ...core.reading import text_of
from ...training.scores import bounds_of
from .latency import Ends, Seconds, ratio_of


@dataclass(frozen=True)
class Run:
    """One training run of a method on a task, with one seed and one learning rate, and its results."""

    key: str  # fingerprint of everything that decides the result: task, data, method, training, seed, rate
    task: str
    method: str  # with its settings: "lora rank=8"
    seed: int
    learning_rate: float
    steps: int
    parameters: int  # trained, without a new head
    head: int  # parameters of a new head
    diverged: bool  # the loss was NaN or infinite at some step; there are no scores then
    valid: dict[str, float]  # scores on the validation rows; the first chooses the learning rate; see `Metric`
    test: dict[str, float]  # empty for a run of the search that was not the best
    seconds: float  # of training
    peak_bytes: int  # of training: the process on a CPU, tensors on a GPU
    file_bytes: int  # of the trained parameters in a file
    latency: Seconds  # of a forward pass of the model as it is served: LoRA merged
    base_latency: Seconds  # of the model without the method, on the same rows, in the same turns
    other_seconds: float = 0.0  # of all but training: the start of a process, loading, scores, the latency
    alone: bool = False  # in a process of its own; otherwise a process on a CPU may hold what earlier runs left
    together: int = 1  # how many runs were trained in one pass; its time is divided by them, its peak is that of all

    @classmethod
    def of_line(cls, values: dict[str, Any]) -> Run:
        """From a line of the ledger. Older lines hold one number for the shortest turn. Raises TypeError, KeyError."""
        times = {
            name: tuple(value) if isinstance(value := values[name], list) else (value,)
            for name in ("latency", "base_latency")
        }
        return cls(**{**values, **times})


@dataclass(frozen=True)
class Interval:
    """The mean over the seeds, and half of its 95 % confidence interval (Student's t).

    half is None for fewer than three seeds: with two, t's quantile is 12.7, and the interval says nothing. bounds: the
    least and the greatest value that the score can have; None: there is none.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]  # in the order of the seeds
    bounds: tuple[float | None, float | None] = (None, None)

    @property
    def ends(self) -> tuple[float, float] | None:
        """The ends of the interval, within the bounds; None without an interval."""
        if self.half is None:
            return None
        least, greatest = self.bounds
        low, high = self.mean - self.half, self.mean + self.half
        return low if least is None else max(low, least), high if greatest is None else min(high, greatest)

    @property
    def is_cut(self) -> bool:
        """Whether a bound makes the interval one-sided, so that mean ± half would say too much."""
        return self.half is not None and self.ends != (self.mean - self.half, self.mean + self.half)

    @classmethod
    def of(cls, values: Sequence[float], bounds: tuple[float | None, float | None] = (None, None)) -> Interval:
        """Raises ValueError without values."""
        count = len(values)
        if not count:
            raise LoraError("an interval of no values.")
        mean = sum(values) / count
        if count < 3:
            return cls(mean, None, tuple(values), bounds)
        from scipy import stats

        deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
        quantile = float(stats.t.ppf(0.975, count - 1))
        return cls(mean, quantile * deviation / math.sqrt(count), tuple(values), bounds)


@dataclass(frozen=True)
class MethodRow:
    """A method on a task, over all seeds."""

    task: str
    method: str
    parameters: int
    head: int
    learning_rate: float
    tried: dict[float, float | None]  # rate → its validation score that chooses the rate; None: diverged
    scores: dict[str, Interval]  # metric → scores of the seeds that did not diverge; empty if all diverged
    seeds: int
    diverged: int  # number of seeds that diverged
    seconds: float  # the shortest training time, because other work on the machine only adds to it
    peak_bytes: int  # the largest
    alone: bool  # whether each run had a process of its own, so that the peak is that of the run
    file_bytes: int
    latency: float  # as a multiple of the model without the method: 1.0 is equally fast
    latency_ends: Ends | None  # of its 95 % interval; None: too few turns were timed
    together: int = 1  # the most runs that were trained in one pass with one of these


@dataclass(frozen=True)
class TaskFacts:
    """What the scores of a task come from."""

    name: str
    source: str  # where the data came from, as the user named it
    kind: str  # classification | regression | causal-lm | images, …
    rows: dict[str, int]  # train, valid, test
    metrics: tuple[str, ...]  # the first is the one that is plotted
    chosen_by: str  # the validation metric of the learning-rate search
    training: dict[str, Any]  # steps, batch size, epochs, …: settings shared by all methods
    published: dict[str, dict[str, float]] = field(default_factory=dict)  # method as published → metric → value


@dataclass(frozen=True)
class Comparison:
    """All results of one `lorakit compare`."""

    model: str
    tasks: tuple[TaskFacts, ...]
    rows: tuple[MethodRow, ...]  # tasks in order, methods in order
    left_out: tuple[tuple[str, str, str], ...]  # task, method, why it does not apply
    seeds: tuple[int, ...]
    trials: int  # learning rates that each method may try on each task
    machine: dict[str, str]
    finished: bool = True  # False: some runs are still to be made


class Ledger:
    """runs.jsonl: a line for each finished run, written as soon as it is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[str, Run] = {}
        self._cut = False  # whether an interruption left the last line without its end
        if path.is_file():
            text = text_of(path)
            self._cut = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    run = Run.of_line(json.loads(line))
                except (ValueError, TypeError, KeyError):
                    continue  # a line that an interruption cut off, or another version's
                self._runs[run.key] = run

    def __len__(self) -> int:
        return len(self._runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def get(self, key: str) -> Run | None:
        return self._runs.get(key)

    def add(self, run: Run) -> None:
        """Keep `run` in memory and in the file. It replaces an earlier run with the same key."""
        self._runs[run.key] = run
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._cut else "") + json.dumps(asdict(run)) + "\n")
        self._cut = False


def row_of(runs: Sequence[Run], searched: Iterable[Run], chosen_by: str) -> MethodRow:
    """The row of one method on one task. runs: one for each seed. searched: those of the learning-rate search."""
    first = runs[0]
    good = [run for run in runs if not run.diverged]
    metrics: Mapping[str, float] = good[0].test if good else {}
    latency, latency_ends = ratio_of([(run.latency, run.base_latency) for run in runs])
    return MethodRow(
        task=first.task,
        method=first.method,
        parameters=first.parameters,
        head=first.head,
        learning_rate=first.learning_rate,
        tried={run.learning_rate: None if run.diverged else run.valid[chosen_by] for run in searched},
        scores={metric: Interval.of([run.test[metric] for run in good], bounds_of(metric)) for metric in metrics},
        seeds=len(runs),
        diverged=len(runs) - len(good),
        seconds=min(run.seconds for run in good or runs),
        peak_bytes=max(run.peak_bytes for run in runs),
        alone=all(run.alone for run in runs),
        together=max(run.together for run in runs),
        file_bytes=first.file_bytes,
        latency=latency,
        latency_ends=latency_ends,
    )
