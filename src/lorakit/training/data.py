"""Read training data. Every row is checked, all bad rows are reported at once, and decisions are noted.

`folders.py` finds the files of each split, `rows.py` reads them, `hub.py` reads data sets of the hub; `shapes.py` makes
an example of each row, `labels.py` finds what labels are for, and `holdout.py` holds rows out if there is no other
split. `tokens.py` turns examples into token ids; none of the files before it needs a tokenizer.

An existing local path always wins over a hub id, and only a name that could be a hub id is looked up there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..core.paths import expanded
from .adapter_names import NONE, unknown
from .at_hub import HubKind, id_at_hub
from .conversations import BadRow
from .folders import no_split, passed_over, split_files
from .holdout import hold_out, note_repeats
from .hub import Hub, is_cached, read_hub
from .labels import with_labels
from .rows import DataError, Findings, Row, read_file, suffixes
from .shapes import Example as Example
from .shapes import parse
from .task import Task


@dataclass(frozen=True)
class Data:
    """The rows of each split, their task, and notes on what was decided while reading them."""

    shape: str
    task: str  # causal-lm | classification | regression
    train: list[Example]
    valid: list[Example]
    test: list[Example]
    labels: tuple[str, ...] = ()  # of a classification
    notes: list[str] = field(default_factory=list)

    @property
    def heldout(self) -> tuple[str, list[Example]]:
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
    adapters: Sequence[str] = (),
) -> Data:
    """Read and check all rows of `data`: a file, a folder with train|valid|test files, or a hub id.

    fields: the file's keys for the roles messages, prompt, completion, text, label ("text": "a,b" is a pair), and
    references, a list of right answers beside or in place of the completion.
    task: what labels are for, classification or regression; auto: decided by the labels.
    hub: which part of a hub data set is meant, if `data` is one.
    model: the task of the model that is scored on the rows. Its labels are then used, and a row cannot name a new one.
    adapters: the names that a row may give under the key "adapter", to be answered by that one ("none": by the base).
    holdout: the share of train that is held out, at random by `seed`, when there is no other split; at most 100 rows.

    Raises DataError listing every bad row, and FileNotFoundError if nothing is found at `data`.
    """
    findings = Findings()
    splits = _read_splits(data, hub or Hub(), findings)
    shape, examples = _examples(splits, dict(fields or {}), adapters, findings)
    if findings.problems:
        raise DataError(findings.problems)
    if not examples["train"]:
        raise DataError([f"{data}: no rows to train on."])
    labels: tuple[str, ...] = ()
    kind = "causal-lm"
    if "label" in shape:
        kind, labels, examples = (
            with_labels(examples, task, findings.notes) if model is None else model.take(examples, findings.notes)
        )
    if examples["valid"] or examples["test"]:
        note_repeats(examples, findings.notes)
    else:
        examples["train"], examples["valid"] = hold_out(examples["train"], holdout, seed, findings.notes)
    return Data(shape, kind, examples["train"], examples["valid"], examples["test"], labels, findings.notes)


read = read_data  # its name until 0.2, by which programs import it


def _examples(
    splits: Mapping[str, list[Row]], fields: Mapping[str, str], adapters: Sequence[str], findings: Findings
) -> tuple[str, dict[str, list[Example]]]:
    """The shape that all rows share, and the examples of each split."""
    examples: dict[str, list[Example]] = {split: [] for split in splits}
    shapes: dict[str, str] = {}
    unread: Counter[str] = Counter()
    for split, rows in splits.items():
        for row in rows:
            try:
                shape, example, beside = parse(row, fields)
                if adapters and "adapter" in beside:
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
            examples[split].append(example)
    if unread:
        findings.notes.append(f"keys that are not read: {', '.join(sorted(unread))}")
    return next(iter(shapes), ""), examples


def _named_adapter(row: Row, adapters: Sequence[str]) -> str | None:
    """The adapter that a row names; None for the base model. Raises BadRow."""
    name = row.values["adapter"]
    if name != NONE and name not in adapters:
        raise BadRow(unknown(name, adapters))
    return None if name == NONE else str(name)


def _read_splits(data: str, hub: Hub, findings: Findings) -> dict[str, list[Row]]:
    """Raw rows by split."""
    path = Path(expanded(data))
    if path.is_file():
        return {"train": read_file(path, findings), "valid": [], "test": []}
    if path.is_dir():
        found = split_files(path)
        if not any(found.values()):
            raise no_split(path, "train, valid or test")
        if others := passed_over(found):
            findings.notes.append(f"files of {data} that are no split and are not read: {', '.join(others)}")
        splits = {split: [row for file in files for row in read_file(file, findings)] for split, files in found.items()}
        if not found["train"]:  # a folder to evaluate on
            splits["train"], splits["test"] = splits["test"] or splits["valid"], []
        return splits
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
