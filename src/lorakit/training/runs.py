"""`lorakit runs`: the runs in some folders side by side, from what each left: its note, config.yaml, metrics.jsonl and
results.json. No model is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import LoraError
from ..core.numbers import duration, rounded, short_number, size
from ..core.table import Table
from ..formats.folder import HIDDEN, OutputFolder
from ..formats.lock import refuse_locked
from .config import TrainConfig
from .outcome import RESULTS, last_losses, logged_lines
from .record import FREE
from .report import ends_text, metric_value, one_line
from .start import TRAINING, settings_in
from .values import value_text

_DEPTH = 3  # levels below a folder in which runs are looked for
_USUAL = dataclasses.asdict(TrainConfig("none", "none", "none"))
_COMPARED = [name for name in _USUAL if name not in FREE or name in ("model", "data", "epochs", "max_steps")]
_WIDEST = 24  # characters of a setting


@dataclass(frozen=True)
class RunFacts:
    """What the folder of one run says. results: results.json, empty before the end of a run and for lorakit 0.2."""

    folder: str
    state: str  # finished, unfinished, failed, running
    settings: Mapping[str, Any]
    losses: Mapping[str, float]
    results: Mapping[str, Any]


def runs_in(folders: Iterable[str]) -> list[RunFacts]:
    """The runs in the folders and below them. Raises FileNotFoundError for no folder, LoraError if there is no run."""
    folders = list(folders)
    found: dict[Path, RunFacts] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder.")
        for path in _run_folders(folder, _DEPTH):
            found.setdefault(path.resolve(), _facts_of(path))
    if not found:
        raise LoraError(f"no run of lorakit train in {', '.join(folders)}, nor in folders up to {_DEPTH} levels below.")
    return list(found.values())


def common_lines(runs: Sequence[RunFacts]) -> list[str]:
    """What all runs share and the table does not repeat: the model and the data."""
    lines = []
    for name in ("model", "data"):
        values = {value_text(run.settings.get(name)) for run in runs}
        if len(values) == 1:
            lines.append(f"{name}: {values.pop()}")
    return lines


def runs_table(runs: Sequence[RunFacts]) -> Table:
    """A line for each run. Settings are shown if the runs differ in them, and the state of a run that is not finished.

    A score stands with its 95 % interval over the held-out rows.
    """
    columns: dict[str, Callable[[RunFacts], str]] = {
        "run": lambda run: run.folder,
        "state": lambda run: "" if run.state == "finished" else run.state,
    }
    columns |= {name: _setting_of(name) for name in _differing(runs)}
    for metric in dict.fromkeys(name for run in runs for name in run.results.get("scores", {})):
        columns[metric] = _score_of(metric)
    columns |= {
        "training loss": lambda run: _loss(run, "training"),
        "held-out loss": lambda run: _loss(run, "held-out"),
        "time": lambda run: _number(run, "seconds", duration),
        "peak": lambda run: _number(run, "peak_bytes", size),
        "finished": lambda run: str(run.results.get("finished", ""))[:16].replace("T", " "),
    }
    filled = {head: cells for head, cell in columns.items() if any(cells := [cell(run) for run in runs])}
    left = frozenset(place for place, head in enumerate(filled) if head in ("run", "state", *_USUAL))
    return Table(tuple(filled), tuple(zip(*filled.values(), strict=True)), left=left)


def runs_json(runs: Sequence[RunFacts]) -> str:
    """All that is known of the runs, as a JSON list."""
    plain = [dataclasses.asdict(run) for run in runs]
    return json.dumps(rounded(plain), ensure_ascii=False, allow_nan=False, indent=1, default=str) + "\n"


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / HIDDEN / f"{TRAINING.command}.json").is_file() or TRAINING.released(folder):
        yield folder
        return
    if depth:
        with contextlib.suppress(PermissionError):
            for entry in sorted(folder.iterdir()):
                if entry.is_dir() and not entry.name.startswith("."):
                    yield from _run_folders(entry, depth - 1)


def _facts_of(folder: Path) -> RunFacts:
    return RunFacts(
        str(folder),
        _state(folder),
        settings_in(folder),
        last_losses(logged_lines(folder / "metrics.jsonl")),
        _results(folder),
    )


def _state(folder: Path) -> str:
    out = OutputFolder(folder, TRAINING)
    try:
        refuse_locked(out.hidden / "lock")
        note = out.note
    except FileExistsError:
        return "running"
    except LoraError:
        return "unknown"
    if note is None or not note.record:  # of lorakit 0.1.0, which left no note
        return "finished" if (folder / TRAINING.keystone).is_file() else "unfinished"
    return note.state


def _results(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _differing(runs: Sequence[RunFacts]) -> list[str]:
    """The settings in which the runs differ."""
    return [name for name in _COMPARED if len({_value(run, name) for run in runs}) > 1]


def _setting_of(name: str) -> Callable[[RunFacts], str]:
    if name in ("model", "data"):
        return lambda run: _value(run, name)  # a path differs at its end
    return lambda run: one_line(_value(run, name), _WIDEST)


def _value(run: RunFacts, name: str) -> str:
    """The text of a setting of a run. One that the run's lorakit did not have yet has its default."""
    value = run.settings.get(name, _USUAL[name])
    if name == "alpha" and value is None:  # lorakit before 0.3 wrote null for 2·rank
        value = 2.0 * run.settings.get("rank", _USUAL["rank"])
    return value_text(value)


def _score_of(metric: str) -> Callable[[RunFacts], str]:
    def cell(run: RunFacts) -> str:
        score = run.results.get("scores", {}).get(metric)
        if score is None or score.get("adapter") is None:
            return ""
        ends = score.get("adapter_interval")
        return metric_value(metric, score["adapter"]) + (f" ({ends_text(metric, ends)})" if ends else "")

    return cell


def _loss(run: RunFacts, name: str) -> str:
    return short_number(run.losses[name]) if name in run.losses else ""


def _number(run: RunFacts, name: str, shown: Callable[[float], str]) -> str:
    value = run.results.get(name)
    return shown(value) if value else ""
