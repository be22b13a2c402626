"""Reading training data: any of the usual shapes, every row checked, all bad rows reported at once.

Shapes, told by the keys of a row, in this order (messages_field and the like map other keys to these):

    messages                            chat: a list of {"role", "content"}
    conversations                       chat as ShareGPT writes it: a list of {"from", "value"}
    prompt + completion                 two texts, or two lists of messages
    instruction [+ input] + output      Alpaca
    text [+ text_pair] + label          classification; a label with a fraction makes it regression
    sentence1 + sentence2 + label       the same, as GLUE calls it
    text                                plain text

Files are read in `rows.py`, data sets of the hub in `hub.py`; `tokens.py` turns examples into token ids, and nothing
here knows a tokenizer. An existing local path always wins over a hub id, and only a name that could be a hub id is
looked up there.
"""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .hub import Hub, read_hub
from .rows import SPLIT_NAMES, SUFFIXES, DataError, Row, kind, read_file
from .task import Task

SHAPES = "messages | conversations | prompt+completion | instruction+output | text+label | text"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
          "system": "system", "tool": "tool", "developer": "developer"}  # fmt: skip
_MOST_HELD_OUT = 100


@dataclass(frozen=True)
class Example:
    """One row in one of three forms: messages; prompt and completion; text, perhaps with a label."""

    where: str  # "train.jsonl:3"
    messages: tuple[dict[str, str], ...] | None = None
    prompt: str | None = None
    completion: str | None = None
    others: tuple[str, ...] = ()  # completions that are right as well
    text: str | None = None
    text_pair: str | None = None
    label: str | float | None = None


@dataclass(frozen=True)
class Data:
    """The rows of each split, what they are for, and what was decided in reading them."""

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


def read(
    data: str,
    *,
    fields: Mapping[str, str] | None = None,
    holdout: float = 0.05,
    seed: int = 0,
    hub: Hub | None = None,
    model: Task | None = None,
) -> Data:
    """Read and check all rows of `data`: a file, a folder with train|valid|test files, or a hub id.

    fields: the file's keys for the roles messages, prompt, completion, text, label ("text": "a,b" is a pair), and
    references, a list of right answers beside or in place of the completion.
    hub: which part of a data set of the hub, where `data` is one.
    model: the task of the model that the rows are to score; the labels are then its own, and no row names a new class.
    holdout: the share of train that is held out, at random by `seed`, when there is no other split; at most 100 rows.

    Raises DataError listing every bad row, FileNotFoundError for a path that is not there.
    """
    splits, problems = _read_splits(data, hub or Hub())
    fields = dict(fields or {})
    examples: dict[str, list[Example]] = {}
    shapes: dict[str, str] = {}
    for split, rows in splits.items():
        examples[split] = []
        for row in rows:
            try:
                shape, example = _parse(row, fields)
            except _BadRow as bad:
                problems.append(f"{row.where}: {bad}")
                continue
            shapes.setdefault(shape, row.where)
            if len(shapes) > 1 and shape != next(iter(shapes)):
                first, where = next(iter(shapes.items()))
                problems.append(f"{row.where}: a row of the shape {shape}, but {where} has the shape {first}; use one.")
                continue
            examples[split].append(example)
    if problems:
        raise DataError(sorted(problems, key=_place))
    if not examples.get("train"):
        raise DataError([f"{data}: no rows to train on."])
    notes: list[str] = []
    shape = next(iter(shapes))
    labels: tuple[str, ...] = ()
    task = "causal-lm"
    if "label" in shape:
        task, labels, examples = _with_labels(examples) if model is None else model.take(examples, notes)
    _hold_out(examples, holdout, seed, notes)
    return Data(shape, task, examples["train"], examples["valid"], examples["test"], labels, notes)


# --- splits to rows ------------------------------------------------------------------------------------------------


def _read_splits(data: str, hub: Hub) -> tuple[dict[str, list[Row]], list[str]]:
    """Raw rows by split, and a line for each that could not even be read."""
    path = Path(data).expanduser()
    problems: list[str] = []
    splits: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    if path.is_file():
        splits["train"] = read_file(path, problems)
        return splits, problems
    if path.is_dir():
        found = {name: _split_file(path, stems) for name, stems in SPLIT_NAMES.items()}
        if not any(found.values()):
            raise FileNotFoundError(f"{data} holds no train, valid or test file ({', '.join(SUFFIXES)}).")
        for name, file in found.items():
            splits[name] = read_file(file, problems) if file else []
        if found["train"] is None:  # a folder to evaluate on
            splits["train"], splits["test"] = splits["test"] or splits["valid"], []
        return splits, problems
    if _is_path(data):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise FileNotFoundError(
            f"{data}: no such file or folder." + (f" Did you mean {path.parent / near[0]}?" if near else "")
        )
    return read_hub(data, hub), problems


def _split_file(folder: Path, stems: Sequence[str]) -> Path | None:
    found = [
        folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()
    ]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both {found[0].name} and {found[1].name}; keep one, or name the file.")
    return found[0] if found else None


def _is_path(data: str) -> bool:
    return data.startswith((".", "~", "/")) or data.count("/") > 1 or "\\" in data or Path(data).suffix in SUFFIXES


def _place(problem: str) -> tuple[str, int]:
    """File and line at the beginning of what is wrong with a row."""
    file, _, rest = problem.partition(":")
    line = rest.partition(":")[0]
    return file, int(line) if line.isdecimal() else 0


# --- rows to examples ----------------------------------------------------------------------------------------------


class _BadRow(Exception):
    """What is wrong with one row."""


def _parse(row: Row, fields: Mapping[str, str]) -> tuple[str, Example]:
    """The shape of a row and the example it is."""
    values = _renamed(row.values, fields)
    keys = values.keys()
    if "messages" in keys:
        return "messages", Example(row.where, messages=_messages(values["messages"], "role", "content"))
    if "conversations" in keys:
        return "conversations", Example(row.where, messages=_messages(values["conversations"], "from", "value"))
    if "prompt" in keys and ({"completion", "references"} & keys):
        return "prompt+completion", _pair(row, values)
    if {"instruction", "output"} <= keys:
        more = values.get("input") or ""
        prompt = _text(values, "instruction") + (f"\n\n{more}" if more else "")
        return "instruction+output", Example(row.where, prompt=prompt, completion=_text(values, "output"))
    if "label" in keys and ({"text"} <= keys or {"sentence1", "sentence2"} <= keys):
        first, second = ("text", "text_pair") if "text" in keys else ("sentence1", "sentence2")
        pair = _text(values, second) if second in keys else None
        return "text+label", Example(
            row.where, text=_text(values, first), text_pair=pair, label=_label(values["label"])
        )
    if "text" in keys:
        return "text", Example(row.where, text=_text(values, "text"))
    raise _BadRow(_unknown_keys(list(row.values)))


def _renamed(values: dict[str, Any], fields: Mapping[str, str]) -> dict[str, Any]:
    renamed = dict(values)
    for role, key in fields.items():
        keys = [part.strip() for part in key.split(",")] if role == "text" else [key]
        for name, key in zip(("text", "text_pair") if role == "text" else (role,), keys, strict=False):
            if key not in values:
                near = difflib.get_close_matches(key, list(values), n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise _BadRow(f"no key {key!r} (--{role}-field {fields[role]}); found {sorted(values)}.{hint}")
            renamed.pop(key, None)
            renamed[name] = values[key]
    return renamed


def _unknown_keys(keys: list[str]) -> str:
    message = f"found keys {keys}, expected one of: {SHAPES}."
    asks = next((key for key in keys if key.lower() in ("question", "query", "request", "input", "source")), None)
    answers = next((key for key in keys if key.lower() in ("answer", "response", "output", "target", "reply")), None)
    if asks and answers:
        message += f" Map them: --prompt-field {asks} --completion-field {answers}"
    elif len(keys) == 2:
        message += f" Map them: --prompt-field {keys[0]} --completion-field {keys[1]}"
    return message


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if value is None:
        raise _BadRow(f"{key} is null")
    if not isinstance(value, str):
        raise _BadRow(f"{key} is {kind(value)}, expected text")
    if not value.strip():
        raise _BadRow(f"{key} is empty")
    return value


def _pair(row: Row, values: Mapping[str, Any]) -> Example:
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Example(row.where, messages=_messages([*prompt, *completion], "role", "content"))
    if isinstance(prompt, list):
        prompt = _linear(prompt)
    references = values.get("references") or []
    if not isinstance(references, list):
        raise _BadRow(f"references is {kind(references)}, expected a list of texts")
    right = {"completion": completion} if "completion" in values else {}
    right |= {f"reference {number}": text for number, text in enumerate(references, 1)}
    texts = list(dict.fromkeys(_text(right, key) for key in right))
    if not texts:
        raise _BadRow("references is empty")
    return Example(row.where, prompt=_text({"prompt": prompt}, "prompt"), completion=texts[0], others=tuple(texts[1:]))


def _linear(parts: Sequence[Any]) -> str:
    """Records as a line, as GPT-2 reads them in the LoRA paper: "subject : relation : object | …"."""
    texts = [part.replace(" | ", " : ") if isinstance(part, str) else " : ".join(map(str, part)) for part in parts]
    return " | ".join(" ".join(text.split()) for text in texts)


def _messages(value: Any, role_key: str, content_key: str) -> tuple[dict[str, str], ...]:
    if value is None:
        raise _BadRow("messages is null")
    if not isinstance(value, list) or not value:
        raise _BadRow("messages is empty" if value == [] else f"messages is {kind(value)}, expected a list")
    turns = []
    for number, turn in enumerate(value, 1):
        if not isinstance(turn, dict) or role_key not in turn or content_key not in turn:
            raise _BadRow(f"message {number}: expected the keys {role_key!r} and {content_key!r}")
        role = _ROLES.get(str(turn[role_key]))
        if role is None:
            raise _BadRow(f"message {number}: unknown role {turn[role_key]!r}; expected {', '.join(_ROLES)}")
        turns.append({"role": role, "content": _content(turn[content_key], number, role)})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise _BadRow("no assistant turn, so there is nothing to learn")
    if turns[-1]["role"] != "assistant":
        raise _BadRow("the last turn is not the assistant's; nothing would be learnt from it")
    return tuple(turns)


def _content(value: Any, number: int, role: str) -> str:
    if isinstance(value, list):
        kinds = {part.get("type") if isinstance(part, dict) else None for part in value}
        if kinds - {"text"}:
            raise _BadRow(f"message {number}: holds {', '.join(map(str, kinds - {'text'}))}; only text is supported")
        value = "".join(part["text"] for part in value)
    if value is None:
        raise _BadRow(f"message {number}: content is null")
    if not isinstance(value, str):
        raise _BadRow(f"message {number}: content is {kind(value)}, expected text")
    if role == "assistant" and not value.strip():
        raise _BadRow(f"message {number}: the assistant's content is empty")
    return value


def _label(value: Any) -> str | float:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _BadRow("label is null")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) else str(value)
    if not isinstance(value, str):
        raise _BadRow(f"label is {kind(value)}, expected a class or a number")
    if not value.strip():
        raise _BadRow("label is empty")
    return value


# --- splits and labels ---------------------------------------------------------------------------------------------


def _with_labels(examples: dict[str, list[Example]]) -> tuple[str, tuple[str, ...], dict[str, list[Example]]]:
    """Task, classes and the examples with their labels as the task needs them."""
    numbers = [_number(example.label) for rows in examples.values() for example in rows]
    if all(n is not None for n in numbers) and any(n is not None and not n.is_integer() for n in numbers):
        return "regression", (), {s: [_relabel(e, _number(e.label)) for e in rows] for s, rows in examples.items()}
    named = {split: [_relabel(e, _class_name(e.label)) for e in rows] for split, rows in examples.items()}
    seen = {str(example.label) for example in named["train"]}
    if len(seen) < 2:
        raise DataError(
            [f"all rows of the training split have the label {next(iter(seen))!r}; there is nothing to tell apart"]
        )
    unseen = [
        f"{e.where}: the label {e.label!r} does not occur in train"
        for s in ("valid", "test")
        for e in named[s]
        if str(e.label) not in seen
    ]
    if unseen:
        raise DataError(unseen)
    numeric = all(_number(label) is not None for label in seen)
    labels = sorted(seen, key=(lambda label: float(label)) if numeric else None)
    return "classification", tuple(labels), named


def _relabel(example: Example, label: str | float | None) -> Example:
    return replace(example, label=label)


def _number(label: str | float | None) -> float | None:
    try:
        number = float(label) if label is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _class_name(label: str | float | None) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _hold_out(examples: dict[str, list[Example]], share: float, seed: int, notes: list[str]) -> None:
    rows = examples["train"]
    if examples["valid"] or examples["test"] or not share or len(rows) < 2:
        return
    count = min(max(1, round(share * len(rows))), _MOST_HELD_OUT, len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    examples["valid"] = [row for index, row in enumerate(rows) if index in chosen]
    examples["train"] = [row for index, row in enumerate(rows) if index not in chosen]
    notes.append(f"{count} of {len(rows)} rows held out for evaluation, chosen by the seed (--holdout {share:g})")
