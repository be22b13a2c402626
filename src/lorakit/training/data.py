"""Read training data. Every row is checked, all bad rows are reported at once, and decisions are noted.

`folders.py` finds the files of each split, `rows.py` reads them, `hub.py` reads data sets of the hub; `shapes.py` makes
an example of each row, `labels.py` finds what labels are for, and `holdout.py` holds rows out if there is no other
split. `mixing.py` reads several data sets, each with a weight. `tokens.py` turns examples into token ids; none of the
files before it needs a tokenizer.

An existing local path always wins over a hub id, and only a name that could be a hub id is looked up there.
"""

from __future__ import annotations

import array
import bisect
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.paths import expanded
from .adapter_names import NONE, unknown
from .at_hub import HubKind, id_at_hub
from .bars import progress
from .by_adapter import hold_out_of_each, learner, learners
from .conversations import BadRow, TrainOn
from .folders import no_split, passed_over, split_files
from .holdout import note_repeats
from .hub import Hub, is_cached, read_hub
from .labels import MULTI_LABEL, classes_of, with_labels
from .mixing import Source, sources, weighted
from .rows import DataError, Findings, Row, read_file, suffixes
from .shapes import Example as Example
from .shapes import parse
from .spool import Spool, picked
from .task import Task

# Shapes that may stand side by side in several data sets: each has a question and an answer.
_TALKS = {"messages", "conversations", "prompt+completion", "instruction+output"}


@dataclass(frozen=True)
class Data:
    """The rows of each split, their task, and notes on what was decided while reading them."""

    shape: str
    task: str  # causal-lm | classification | multi-label | regression
    train: Sequence[Example]
    valid: Sequence[Example]
    test: Sequence[Example]
    labels: tuple[str, ...] = ()  # of a classification or a multi-label task
    notes: list[str] = field(default_factory=list)
    adapters: tuple[str, ...] = ()  # that the rows name, each of which learns its own rows

    @property
    def heldout(self) -> tuple[str, Sequence[Example]]:
        """The split to compare on, and its rows: test, or else valid."""
        return ("test", self.test) if self.test else ("valid", self.valid)


def read_data(
    data: str,
    *,
    fields: Mapping[str, str] | None = None,
    task: str = "auto",
    holdout: float = 0.05,
    seed: int = 0,
    hub: Hub | None = None,
    model: Task | None = None,
    train_on: TrainOn = "all",
    adapters: Sequence[str] | None = (),
) -> Data:
    """Read and check all rows of `data`: a file, a folder with train|valid|test files, or a hub id.

    Several are separated by commas, each perhaps with a weight ("a.jsonl,b.jsonl=0.3"): how many times its training
    rows are in the result, drawn by `seed`.
    fields: the file's keys for the roles messages, prompt, completion, text, label ("text": "a,b" is a pair), and
    references, a list of right answers beside or in place of the completion.
    task: what labels are for, classification or regression; auto: decided by the labels.
    hub: which part of a hub data set is meant, if `data` is one.
    model: the task of the model that is scored on the rows. Its labels are then used, and a row cannot name a new one.
    train_on: which of the assistant's turns are learnt.
    adapters: the names that a row may give under the key "adapter", to be answered by that one ("none": by the base).
    None: rows are trained on, and may name any. Then all of them name one, and each adapter's rows are held out alone.
    holdout: the share of train that is held out, at random by `seed`, when there is no other split; at most 100 rows.

    Raises DataError listing every bad row, and FileNotFoundError if nothing is found at `data`.
    """
    findings = Findings()
    parts = sources(data)
    shape, examples, counts = _mixed(parts, hub or Hub(), dict(fields or {}), train_on, adapters, findings)
    if findings.problems:
        raise DataError(findings.problems)
    if not examples["train"]:
        raise DataError([f"{data}: no rows to train on."])
    labels: tuple[str, ...] = ()
    kind = "causal-lm"
    if "label" in shape:
        kind, labels, found = (
            with_labels(examples, task, findings.notes) if model is None else model.take(examples, findings.notes)
        )
        examples = dict(found)
    train = examples["train"]
    named = learners(examples, findings.notes) if findings.learners else ()
    left: Sequence[int] = range(len(train))
    if examples["valid"] or examples["test"]:
        note_repeats(examples, findings.notes)
    else:
        left, held = hold_out_of_each(train, named, holdout, seed, findings.notes)
        examples["valid"] = [train[index] for index in held]
    if kind == MULTI_LABEL and model is None:
        learnt = {label for index in left for label in classes_of(train[index])}
        if lost := [label for label in labels if label not in learnt]:
            findings.notes.append(f"classes that only held-out rows have: {', '.join(lost)}")
    if len(parts) > 1 or parts[0].weight != 1:
        left = _shares(parts, left, counts, seed, findings.notes)
    if len(left) != len(train) or not isinstance(left, range):
        train = picked(train, left)
    return Data(shape, kind, train, examples["valid"], examples["test"], labels, findings.notes, named)


read = read_data  # its name until 0.2, by which programs import it


def _mixed(
    parts: Sequence[Source],
    hub: Hub,
    fields: Mapping[str, str],
    train_on: TrainOn,
    adapters: Sequence[str] | None,
    findings: Findings,
) -> tuple[str, dict[str, Sequence[Example]], list[int]]:
    """The shape or shapes of all data sets, their examples by split, and how many training rows each data set has."""
    shapes: dict[str, str] = {}
    together: dict[str, Spool[Example]] = {"train": Spool(), "valid": Spool(), "test": Spool()}
    counts: list[int] = []
    for part in parts:
        own = Findings()
        place = "" if len(parts) == 1 else f"{part.name} · "
        before = len(together["train"])
        shape = _read_examples(_read_splits(part.name, hub, own), fields, train_on, adapters, own, together, place)
        first = next(iter(shapes), shape)
        if shape and not (shape == first or {shape, first} <= _TALKS):
            own.problems.append(f"{part.name}: rows of the shape {shape}, but {shapes[first]} has {first}.")
        shapes.setdefault(shape, part.name)
        findings.problems += [place + problem for problem in own.problems]
        findings.notes += [place + note for note in own.notes]
        findings.learners |= own.learners
        counts.append(len(together["train"]) - before)
    return " | ".join(filter(None, shapes)), {split: rows.settled() for split, rows in together.items()}, counts


def _shares(
    parts: Sequence[Source], left: Sequence[int], counts: Sequence[int], seed: int, notes: list[str]
) -> Sequence[int]:
    """The indices of the training rows of each data set, as often as its weight says. counts: rows of each data set.

    left: the indices of the rows that are not held out, in order.
    """
    mixed = array.array("q")
    said = []
    stop = 0
    for part, count in zip(parts, counts, strict=True):
        start, stop = stop, stop + count
        own = left[bisect.bisect_left(left, start) : bisect.bisect_left(left, stop)]
        mixed.extend(share := weighted(own, part.weight, seed))
        said.append(f"{part.name} {len(share)}" + (f" (={part.weight:g} of {len(own)})" if part.weight != 1 else ""))
    notes.append(f"rows of each data set in an epoch: {', '.join(said)}")
    return mixed


def _read_examples(
    splits: Mapping[str, Iterable[Row]],
    fields: Mapping[str, str],
    train_on: TrainOn,
    adapters: Sequence[str] | None,
    findings: Findings,
    into: Mapping[str, Spool[Example]],
    place: str,
) -> str:
    """Append the examples of each split to those in `into`; returns the shape that all rows share.

    place: of the data set, put before that of each row.
    """
    shapes: dict[str, str] = {}
    unread: Counter[str] = Counter()
    for split, rows in splits.items():
        for row in progress(rows, f"reading {split}"):
            try:
                shape, example, beside = parse(row, fields, train_on)
                if "adapter" in beside and adapters is None:
                    example = replace(example, adapter=learner(row))
                    findings.learners.add(str(example.adapter))
                    beside.discard("adapter")
                elif "adapter" in beside and adapters:
                    example = replace(example, adapter=_named_adapter(row, adapters))
                    beside.discard("adapter")
            except BadRow as bad:
                findings.problems.append(f"{row.where}: {bad}")
                continue
            shapes.setdefault(shape, row.where)
            first, where = next(iter(shapes.items()))
            if shape != first and {shape, first} != {"messages", "conversations"}:
                problem = f"a row of the shape {shape}, but {where} has the shape {first}; use one."
                findings.problems.append(f"{row.where}: {problem}")
                continue
            unread.update(beside)
            into[split].append(replace(example, where=place + example.where) if place else example)
    if unread:
        findings.notes.append(f"keys that are not read: {', '.join(sorted(unread))}")
    return next(iter(shapes), "")


def _named_adapter(row: Row, adapters: Sequence[str]) -> str | None:
    """The adapter that a row names; None for the base model. Raises BadRow."""
    name = row.values["adapter"]
    if name != NONE and name not in adapters:
        raise BadRow(unknown(name, adapters))
    return None if name == NONE else str(name)


def _read_splits(data: str, hub: Hub, findings: Findings) -> Mapping[str, Iterable[Row]]:
    """Raw rows by split, read while they are taken."""
    path = Path(expanded(data))
    if path.is_file():
        return {"train": read_file(path, findings), "valid": [], "test": []}
    if path.is_dir():
        found = split_files(path)
        if not any(found.values()):
            raise no_split(path, "train, valid or test")
        if others := passed_over(found):
            findings.notes.append(f"files of {data} that are no split and are not read: {', '.join(others)}")
        if not found["train"]:  # a folder to evaluate on
            found = {**found, "train": found["test"] or found["valid"], "test": []}
        return {
            split: itertools.chain.from_iterable(read_file(file, findings) for file in files)
            for split, files in found.items()
        }
    return read_hub(id_at_hub(expanded(data), _DATA_SET), hub)


def _is_data(path: Path) -> bool:
    try:
        return any(split_files(path).values()) if path.is_dir() else suffixes(path)[0] is not None
    except (OSError, ValueError):  # a folder that cannot be read, or that holds a split twice
        return path.is_dir()


_DATA_SET = HubKind(
    word="data set",
    place="file or folder",
    address="datasets/",
    is_one=_is_data,
    is_file=lambda path: suffixes(path)[0] is not None,
    is_cached=is_cached,
    ask=lambda hub, name, seconds: hub.dataset_info(name, timeout=seconds),
)
