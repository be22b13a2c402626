"""results.json of an output folder: what a run came to, for programs and for `lorakit runs`.

    {"lorakit": "0.3.0", "finished": "2026-01-31T12:00+00:00", "model": …, "data": …, "command": …, "device": …,
     "seconds": 46.1, "peak_bytes": …, "planned_bytes": …, "steps": 180, "trained_parameters": …,
     "losses": {"training": 0.012, "held-out": 0.4},
     "rows": 96, "split": "test",
     "scores": {"exact match": {"base": 0.0, "adapter": 0.8125,
                                "base_interval": [0.0, 0.038], "adapter_interval": [0.723, 0.878]}}}

A share lies in [0, 1]. Numbers have six digits. A number that is not known is null.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..core.numbers import rounded
from .report import Evaluation

RESULTS = "results.json"

Score = Mapping[str, Any]  # base, adapter; base_interval, adapter_interval: two numbers each, or None


@dataclass(frozen=True)
class Outcome:
    """The fields of results.json. finished: the end of the run, in ISO's form. seconds, peak_bytes: of training."""

    lorakit: str
    finished: str
    model: str
    data: str
    command: str
    device: str
    seconds: float
    peak_bytes: int
    planned_bytes: int | None
    steps: int
    trained_parameters: int
    losses: Mapping[str, float]
    rows: int = 0
    split: str = ""
    scores: Mapping[str, Score] = field(default_factory=dict)

    def as_json(self) -> str:
        return json.dumps(rounded(asdict(self)), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def scores_of(result: Evaluation | None) -> dict[str, Score]:
    """The scores of an evaluation, by the name of the metric."""
    found: dict[str, Score] = {}
    for name, (base, adapter) in result.metrics.items() if result is not None else ():
        ends = result.intervals.get(name, (None, None)) if result is not None else (None, None)
        found[name] = {"base": base, "adapter": adapter, "base_interval": ends[0], "adapter_interval": ends[1]}
    return found


def logged_lines(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl; none if there is no file. An interruption may have cut off the last one."""
    lines = []
    with contextlib.suppress(OSError):
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def lines_of(history: Iterable[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """What was logged of one adapter, as lines of metrics.jsonl of a run alone."""
    losses = {f"loss {name}": "loss", f"eval_loss {name}": "eval_loss"}
    return [
        {losses.get(key, key): value for key, value in line.items() if key in ("step", "epoch", "seconds", *losses)}
        for line in history
    ]


def last_losses(history: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The newest training loss and the newest held-out loss of the lines of metrics.jsonl."""
    newest: dict[str, float] = {}
    for line in history:
        newest |= {name: line[key] for key, name in (("loss", "training"), ("eval_loss", "held-out")) if key in line}
    return newest


def trained_seconds(history: Sequence[Mapping[str, float]], newest: float) -> float:
    """The time of training of all processes that a run took, one after another. newest: that of the last one.

    Each process counts from 0 in metrics.jsonl. What a process trained after its last kept line is not known.
    """
    found, before = 0.0, 0.0
    for line in history:
        seconds = line.get("seconds", before)
        if seconds < before:
            found += before
        before = seconds
    return found + newest if newest >= before else found + before + newest


def device_name(device: torch.device) -> str:
    """What a run was computed on: the name of the GPU, or the number of threads of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type.upper()}, {threads} thread{'s' if threads != 1 else ''} of {os.cpu_count()}"
