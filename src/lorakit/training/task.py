"""Find what a model is for, before any weight is loaded: to answer, to name a class or several, to predict a number.

The adapter decides: by the labels.json beside it, or else by its configuration and the rows of its head. Without an
adapter the model's config.json decides. The rows that are scored never decide, because they may lack some classes.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ..core.adapter import Adapter
from ..core.errors import LoraError
from ..core.reading import json_of, text_of
from ..core.words import suggestion
from ..formats import peft
from .adapter_folder import adapter_config, beside
from .labels import as_listed, number_of
from .locating import locate, reading
from .quiet import quietly
from .rows import DataError
from .spool import Spool

if TYPE_CHECKING:
    from .data import Example
    from .shapes import Label

# Beside a classifier's adapter: a list of the names of its classes, empty for a regression; multi-label, an object
# with the list under "labels" and transformers' name of the task under "problem_type".
LABELS = "labels.json"
_PROBLEM = "multi_label_classification"
_CLASSIFIER = "ForSequenceClassification"
_LISTED = 10


@dataclass(frozen=True)
class Task:
    """The kind of task, and its classes in the order of the head's rows.

    named: whether a file names the classes; otherwise they are called 0, 1, 2, …
    """

    kind: Literal["causal-lm", "classification", "multi-label", "regression"]
    labels: tuple[str, ...] = ()
    named: bool = True

    @property
    def answers(self) -> bool:
        """Whether the model writes text."""
        return self.kind == "causal-lm"

    @property
    def several(self) -> bool:
        """Whether a text has any number of classes."""
        return self.kind == "multi-label"

    def __str__(self) -> str:
        if self.answers:
            return "a language model"
        if self.several:
            return f"a multi-label classifier ({_listed(self.labels)})"
        return f"a classifier ({_listed(self.labels)})" if self.labels else "a regression, which predicts a number"

    def take(
        self, splits: Mapping[str, Sequence[Example]], notes: list[str]
    ) -> tuple[str, tuple[str, ...], Mapping[str, Sequence[Example]]]:
        """This model's kind, its classes, and the rows with their labels as the model spells them.

        Classes that no file names get the rows' labels as names, in sorted order, if the counts agree; `notes` then
        says so. Raises DataError that names each label that the model does not know, or the first row if the model is a
        language model.
        """
        if self.answers:
            first = next(row for rows in splits.values() for row in rows)
            raise DataError(
                [
                    f"{first.where}: a row with a label, but the model is no classifier. Score a classifier on it "
                    "(lorakit train makes an adapter for one), or rows with prompt and completion on a language model."
                ]
            )
        task = self
        if self.several:
            return self.kind, self.labels, self._take_several(splits)
        if self.labels and not self.named:
            task = self._named_by(itertools.chain.from_iterable(splits.values()), notes)
        unknown: dict[str, list[Example]] = {}
        found: dict[str, Spool[Example]] = {}
        for split, rows in splits.items():
            found[split] = Spool()
            for row in rows:
                label = task._own(row.label)
                if label is None:
                    unknown.setdefault(str(row.label), []).append(row)
                else:
                    found[split].append(replace(row, label=label))
        if unknown:
            raise DataError([task._unknown(label, rows) for label, rows in unknown.items()])
        return task.kind, task.labels, {split: rows.settled() for split, rows in found.items()}

    def _take_several(self, splits: Mapping[str, Sequence[Example]]) -> Mapping[str, Sequence[Example]]:
        problems: list[str] = []
        found: dict[str, list[Example]] = {}
        for split, rows in splits.items():
            found[split] = []
            for row in rows:
                if not isinstance(row.label, tuple):
                    problems.append(f"{row.where}: the label {row.label!r} is no list, and this is {self}")
                    continue
                own = {label: self._own(label) for label in row.label}
                problems += [self._unknown(label, [row]) for label, known in own.items() if known is None]
                found[split].append(replace(row, label=as_listed([str(known) for known in own.values()], self.labels)))
        if problems:
            raise DataError(problems)
        return found

    def _own(self, label: Label | None) -> str | float | None:
        """The label as the model spells it; None for a label that it does not know."""
        if isinstance(label, tuple):
            return None
        number = number_of(label)
        if not self.labels:
            return number
        text = str(label)
        if text in self.labels:
            return text
        if text.lower() in ("true", "false"):  # JSON writes true, and a table True or TRUE
            return next((own for own in self.labels if own.lower() == text.lower()), None)
        return None if number is None else next((own for own in self.labels if number_of(own) == number), None)

    def _named_by(self, rows: Iterable[Example], notes: list[str]) -> Task:
        labels = {str(row.label) for row in rows}
        if all(self._own(label) is not None for label in labels) or len(labels) != len(self.labels):
            return self
        names = tuple(sorted(labels))
        notes.append(
            f"no file names the {len(names)} classes of this model; they are taken to be {_listed(names)}, in this "
            f"order. If that is wrong, write their names as a JSON list into {LABELS} beside the adapter."
        )
        return replace(self, labels=names)

    def _unknown(self, label: str, rows: list[Example]) -> str:
        also = f" ({len(rows)} rows have it)" if len(rows) > 1 else ""
        if not self.labels:
            return f"{rows[0].where}: the label {label!r} is not a number{also}; the model predicts numbers"
        hint = suggestion(label, self.labels)
        if not self.named:
            hint = f" No file names them: write their names as a JSON list into {LABELS} beside the adapter."
        return f"{rows[0].where}: {label!r} is no class of this model{also}. Its classes: {_listed(self.labels)}.{hint}"


def model_task(base: str | None, adapter: str | None) -> Task:
    """What a base model, or an adapter on it, is for. base=None: the base is unknown, so only the adapter decides.

    Raises ValueError for a task that lorakit does not support, and for a labels.json that is not a list of names.
    """
    if adapter is None:
        return _of_model(base) if base else Task("causal-lm")
    kind = adapter_config(adapter).get("task_type")
    if kind == "CAUSAL_LM":
        return Task("causal-lm")
    if kind not in (None, "SEQ_CLS"):
        raise LoraError(
            f"{adapter}/{peft.CONFIG}: task_type is {kind}; lorakit uses adapters of language models (CAUSAL_LM) and "
            "of classifiers (SEQ_CLS)."
        )
    path = beside(adapter, LABELS)
    if path is not None:
        return read_labels(path)
    own = _of_model(base) if base else Task("causal-lm")
    several = bool(base) and own.several
    rows = _head_rows(base, peft.stored_adapter(adapter)) if base else None
    if rows is None:
        if kind == "SEQ_CLS" and own.answers:
            raise LoraError(
                f"{adapter} is an adapter of a classifier, but holds neither a trained head nor {LABELS}, so its "
                "classes are not known."
            )
        return own
    if rows == 1 and not several:
        return Task("regression")
    names = _names_in(_config(base)) if base else ()
    return _of_names(names, several) if len(names) == rows else _unnamed(rows, several)


def in_model_order(labels: tuple[str, ...], base: str) -> tuple[str, ...]:
    """The classes in the order of the base model, if it is a classifier of the same classes; otherwise unchanged.

    The base model's trained head then keeps its meaning. Upper and lower case are equal.
    """
    own = [name.lower() for name in _names_in(_config(base))]
    if sorted(own) != sorted(label.lower() for label in labels):
        return labels
    return tuple(sorted(labels, key=lambda label: own.index(label.lower())))


def _of_names(names: tuple[str, ...], several: bool) -> Task:
    if several:
        return Task("multi-label", names)
    return Task("classification", names) if names else Task("regression")


def _unnamed(count: int, several: bool) -> Task:
    return Task("multi-label" if several else "classification", tuple(map(str, range(count))), named=False)


def _of_model(base: str) -> Task:
    config = _config(base)
    kinds = [str(name) for name in getattr(config, "architectures", None) or ()]
    if not any(name.endswith(_CLASSIFIER) for name in kinds):
        return Task("causal-lm")
    several = config.problem_type == _PROBLEM
    if config.num_labels == 1 and not several:
        return Task("regression")
    names = _names_in(config)
    return _of_names(names, several) if names else _unnamed(config.num_labels, several)


def _names_in(config: Any) -> tuple[str, ...]:
    """The classes that a model's configuration names; none if they are transformers' LABEL_0, LABEL_1, …"""
    names = tuple(str(config.id2label[index]) for index in sorted(config.id2label))
    return () if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def write_labels(path: Path, task: Task) -> None:
    """Write the classes of a classifier beside its adapter."""
    said = {"problem_type": _PROBLEM, "labels": task.labels} if task.several else task.labels
    path.write_text(json.dumps(said, ensure_ascii=False) + "\n", encoding="utf-8")


def read_labels(path: Path) -> Task:
    """The task that a labels.json tells. Raises LoraError for one that is not as `write_labels` writes it."""
    if text_of(path).lstrip().startswith("{"):
        said = json_of(path, dict)
        names = said.get("labels")
        if said.get("problem_type") != _PROBLEM or not isinstance(names, list) or not names:
            raise LoraError(
                f'{path}: expected a list of names, or for a multi-label classifier {{"problem_type": "{_PROBLEM}", '
                f'"labels": [names]}}; found {said}.'
            )
        return _of_names(_names(path, names), True)
    return _of_names(_names(path, json_of(path, list)), False)


def _names(path: Path, names: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise LoraError(f"{path}: expected a list of different names, one for each class, in quotes; found {names}.")
    return tuple(names)


def _head_rows(base: str, adapter: Adapter) -> int | None:
    """The number of classes of the trained head in the adapter's file; None if the file has no head."""
    for name in _head_parameters(base):
        if name in adapter.trained:
            return int(adapter.trained[name].shape[0])
        module = name.rpartition(".")[0]
        if module in adapter.updates:
            return int(adapter.updates[module].B.shape[0])
    return None


def _head_parameters(base: str) -> list[str]:
    """The parameters of a classifier on `base` whose size is the number of its classes."""
    from transformers import AutoModelForSequenceClassification

    shapes: list[dict[str, torch.Size]] = []
    for count in (2, 3):
        config = _config(base)
        config.num_labels = count
        with quietly(), torch.device("meta"):
            try:
                model = AutoModelForSequenceClassification.from_config(config)
            except ValueError:  # transformers has no classifier for such a model
                return []
        shapes.append({name: parameter.shape for name, parameter in model.named_parameters()})
    return [name for name, shape in shapes[0].items() if shape != shapes[1].get(name)]


def _config(base: str) -> Any:
    from transformers import AutoConfig

    folder, options = locate(base)
    with quietly(), reading(base, folder):
        return AutoConfig.from_pretrained(folder, **options)


def _listed(names: tuple[str, ...]) -> str:
    more = f", … {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
