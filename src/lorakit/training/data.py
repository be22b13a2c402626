"""Reading training data: any of the usual shapes, every row checked, all bad rows reported at once.

Shapes, told by the keys of a row, in this order (messages_field and the like map other keys to these):

    messages                            chat: a list of {"role", "content"}
    conversations                       chat as ShareGPT writes it: a list of {"from", "value"}
    prompt + completion                 two texts, or two lists of messages
    instruction [+ input] + output      Alpaca
    text [+ text_pair] + label          classification; a label with a fraction makes it regression
    sentence1 + sentence2 + label       the same, as GLUE calls it
    text                                plain text

Nothing here knows a tokenizer; `tokens.py` turns examples into token ids. An existing local path always wins over a hub
id, and only a name that could be a hub id is looked up there.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
SHAPES = "messages | conversations | prompt+completion | instruction+output | text+label | text"
_SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
          "system": "system", "tool": "tool", "developer": "developer"}  # fmt: skip
# Where the hub keeps a copy of a data set as files subset/split/*.parquet, of those too whose own files are a script.
_CONVERTED = "refs/convert/parquet"
_CONVERTED_FOLDER = "hf://datasets/{name}@refs%2Fconvert%2Fparquet"
_LISTED = 20
_MOST_HELD_OUT = 100


class DataError(ValueError):
    """Rows that cannot be used. The message lists them, one line each: file:line: what is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        shown = list(problems[:_LISTED])
        if len(problems) > _LISTED:
            shown.append(f"... and {len(problems) - _LISTED} more bad rows")
        count = f"{len(problems)} bad row{'s' if len(problems) > 1 else ''}; nothing was loaded:\n"
        super().__init__((count if len(problems) > 1 else "") + "\n".join(shown))


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


@dataclass(frozen=True)
class _Row:
    where: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Hub:
    """Which part of a hub data set is meant, where its id alone does not say."""

    subset: str | None = None  # its configuration
    revision: str | None = None
    splits: Mapping[str, str | None] = field(default_factory=dict)  # train, valid, test → the split's name there


def read(
    data: str,
    *,
    fields: Mapping[str, str] | None = None,
    holdout: float = 0.05,
    seed: int = 0,
    hub: Hub = Hub(),
) -> Data:
    """Read and check all rows of `data`: a file, a folder with train|valid|test files, or a hub id.

    fields: the file's keys for the roles messages, prompt, completion, text, label ("text": "a,b" is a pair), and
    references, a list of right answers beside or in place of the completion.
    holdout: the share of train that is held out, at random by `seed`, when there is no other split; at most 100 rows.

    Raises DataError listing every bad row, FileNotFoundError for a path that is not there.
    """
    splits, problems = _read_splits(data, hub)
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
        task, labels, examples = _with_labels(examples)
    _hold_out(examples, data, holdout, seed, notes)
    return Data(shape, task, examples["train"], examples["valid"], examples["test"], labels, notes)


# --- files to rows -------------------------------------------------------------------------------------------------


def _read_splits(data: str, hub: Hub) -> tuple[dict[str, list[_Row]], list[str]]:
    """Raw rows by split, and a line for each that could not even be read."""
    path = Path(data).expanduser()
    problems: list[str] = []
    splits: dict[str, list[_Row]] = {"train": [], "valid": [], "test": []}
    if path.is_file():
        splits["train"] = _read_file(path, problems)
        return splits, problems
    if path.is_dir():
        found = {name: _split_file(path, stems) for name, stems in _SPLIT_NAMES.items()}
        if not any(found.values()):
            raise FileNotFoundError(f"{data} holds no train, valid or test file ({', '.join(SUFFIXES)}).")
        for name, file in found.items():
            splits[name] = _read_file(file, problems) if file else []
        if found["train"] is None:  # a folder to evaluate on
            splits["train"], splits["test"] = splits["test"] or splits["valid"], []
        return splits, problems
    if _is_path(data):
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise FileNotFoundError(
            f"{data}: no such file or folder." + (f" Did you mean {path.parent / near[0]}?" if near else "")
        )
    return _read_hub(data, hub), problems


def _split_file(folder: Path, stems: Sequence[str]) -> Path | None:
    found = [
        folder / f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES if (folder / f"{stem}{suffix}").is_file()
    ]
    if len(found) > 1:
        raise ValueError(f"{folder} holds both {found[0].name} and {found[1].name}; keep one, or name the file.")
    return found[0] if found else None


def _is_path(data: str) -> bool:
    return data.startswith((".", "~", "/")) or data.count("/") > 1 or "\\" in data or Path(data).suffix in SUFFIXES


def _read_hub(name: str, hub: Hub) -> dict[str, list[_Row]]:
    from datasets import load_dataset

    if hub.revision == _CONVERTED:
        files = _converted_files(name, hub.subset or "default")
        chosen = _chosen_splits(name, hub, files)
        loaded = load_dataset("parquet", data_files={own: files[own] for own in chosen.values()})
    else:
        loaded = load_dataset(name, hub.subset, revision=hub.revision)
        chosen = _chosen_splits(name, hub, loaded)
    splits: dict[str, list[_Row]] = {"train": [], "valid": [], "test": []}
    for split, own in chosen.items():
        splits[split] = [_Row(f"{name}/{own} row {i + 1}", dict(row)) for i, row in enumerate(loaded[own])]
    return splits


def _chosen_splits(name: str, hub: Hub, there: Collection[str]) -> dict[str, str]:
    """train, valid and test → the split of the data set that each is. Where splits are named, others are not meant."""
    named = {split: own for split, own in hub.splits.items() if own is not None}
    # The first of several usual names is the last to be written.
    usual = {split: stem for split, stems in _SPLIT_NAMES.items() for stem in reversed(stems) if stem in there}
    chosen = {"train": "train", **(named or usual)}
    if missing := [own for own in chosen.values() if own not in there]:
        raise ValueError(f"{name} has no split {missing[0]!r}; it has {', '.join(there)}.")
    return chosen


def _converted_files(name: str, subset: str) -> dict[str, str]:
    """The splits in the hub's Parquet copy of a data set, and the pattern of each one's files.

    load_dataset takes the folders of that revision for no subsets, so they are named to it as files.
    """
    from fsspec.core import url_to_fs

    root = _CONVERTED_FOLDER.format(name=name)
    files, path = url_to_fs(root)
    folders = [file.split("/")[-3:-1] for file in sorted(files.glob(f"{path}/*/*/*.parquet"))]
    splits = list(dict.fromkeys(split for own, split in folders if own == subset))
    if not splits:
        subsets = ", ".join(dict.fromkeys(own for own, _ in folders)) or "none"
        raise ValueError(f"{name} has no subset {subset!r} in its Parquet copy; it has {subsets}.")
    return {split: f"{root}/{subset}/{split}/*.parquet" for split in splits}


def _place(problem: str) -> tuple[str, int]:
    """File and line at the beginning of what is wrong with a row."""
    file, _, rest = problem.partition(":")
    line = rest.partition(":")[0]
    return file, int(line) if line.isdecimal() else 0


def _read_file(path: Path, problems: list[str]) -> list[_Row]:
    readers: dict[str, Callable[[Path, list[str]], Iterator[_Row]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_txt,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}.")
    before = len(problems)
    rows = list(readers[path.suffix](path, problems))
    if not rows and len(problems) == before:
        problems.append(f"{path.name}: the file holds no rows.")
    return rows


def _text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError([f"{path.name}:{line}: not UTF-8 (byte {error.start}); save the file as UTF-8."]) from None


def _read_jsonl(path: Path, problems: list[str]) -> Iterator[_Row]:
    # Not splitlines(): JSON may hold U+2028 and the like, which are no ends of lines here.
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON: {error.msg} at column {error.colno}")
            continue
        if isinstance(value, dict):
            yield _Row(where, value)
        else:
            problems.append(f"{where}: expected an object {{…}}, found {_kind(value)}")


def _read_json(path: Path, problems: list[str]) -> Iterator[_Row]:
    try:
        values = json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        problems.append(f"{path.name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}")
        return
    if not isinstance(values, list):
        problems.append(f"{path.name}: expected a list of objects, found {_kind(values)}")
        return
    for index, value in enumerate(values):
        where = f"{path.name}[{index}]"
        if isinstance(value, dict):
            yield _Row(where, value)
        else:
            problems.append(f"{where}: expected an object {{…}}, found {_kind(value)}")


def _read_csv(path: Path, problems: list[str]) -> Iterator[_Row]:
    lines = _text_of(path).splitlines(keepends=True)
    reader = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
    header = next(reader, [])
    start = reader.line_num + 1
    for cells in reader:
        where, start = f"{path.name}:{start}", reader.line_num + 1
        if not cells:
            continue
        if len(cells) != len(header):
            problems.append(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            continue
        yield _Row(where, {key: cell if cell != "" else None for key, cell in zip(header, cells, strict=True)})


def _read_parquet(path: Path, problems: list[str]) -> Iterator[_Row]:
    import pyarrow.parquet

    for index, values in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
        yield _Row(f"{path.name} row {index + 1}", values)


def _read_txt(path: Path, problems: list[str]) -> Iterator[_Row]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            yield _Row(f"{path.name}:{number}", {"text": line.rstrip("\r")})


# --- rows to examples ----------------------------------------------------------------------------------------------


class _BadRow(Exception):
    """What is wrong with one row."""


def _parse(row: _Row, fields: Mapping[str, str]) -> tuple[str, Example]:
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
        raise _BadRow(f"{key} is {_kind(value)}, expected text")
    if not value.strip():
        raise _BadRow(f"{key} is empty")
    return value


def _pair(row: _Row, values: Mapping[str, Any]) -> Example:
    prompt, completion = values["prompt"], values.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return Example(row.where, messages=_messages([*prompt, *completion], "role", "content"))
    if isinstance(prompt, list):
        prompt = _linear(prompt)
    references = values.get("references") or []
    if not isinstance(references, list):
        raise _BadRow(f"references is {_kind(references)}, expected a list of texts")
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
        raise _BadRow("messages is empty" if value == [] else f"messages is {_kind(value)}, expected a list")
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
        raise _BadRow(f"message {number}: content is {_kind(value)}, expected text")
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
        raise _BadRow(f"label is {_kind(value)}, expected a class or a number")
    if not value.strip():
        raise _BadRow("label is empty")
    return value


def _kind(value: Any) -> str:
    names: dict[type, str] = {list: "a list", dict: "an object", str: "text", bool: "true or false", int: "a number",
                              float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


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
    import dataclasses

    return dataclasses.replace(example, label=label)


def _number(label: str | float | None) -> float | None:
    try:
        number = float(label) if label is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _class_name(label: str | float | None) -> str:
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _hold_out(examples: dict[str, list[Example]], data: str, share: float, seed: int, notes: list[str]) -> None:
    rows = examples["train"]
    if examples["valid"] or examples["test"] or not share or len(rows) < 2:
        return
    count = min(max(1, round(share * len(rows))), _MOST_HELD_OUT, len(rows) - 1)
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    examples["valid"] = [row for index, row in enumerate(rows) if index in chosen]
    examples["train"] = [row for index, row in enumerate(rows) if index not in chosen]
    notes.append(f"{count} of {len(rows)} rows held out for evaluation, chosen by the seed (--holdout {share:g})")
