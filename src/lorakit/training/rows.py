"""Files to rows: JSON lines, JSON, CSV, TSV, Parquet, plain text, and what is wrong with lines that are no rows.

A file is read to its end: each such line is reported with its place, not the first alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..formats.files import refuse_pointer
from .problems import grouped

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# Under which names a split is looked for, the usual one first.
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_LISTED = 20


@dataclass(frozen=True)
class Row:
    """The keys and values of one row, and its place: "train.jsonl:3"."""

    where: str
    values: dict[str, Any]


class DataError(ValueError):
    """Rows that cannot be used. The message lists them, one line each: file:line: what is wrong."""

    def __init__(self, problems: Sequence[str]) -> None:
        lines = grouped(problems)
        shown = lines[:_LISTED]
        if len(lines) > _LISTED:
            shown.append(f"... and {len(lines) - _LISTED} more such lines")
        count = f"{len(problems)} bad row{'s' if len(problems) > 1 else ''}; nothing was loaded:\n"
        super().__init__((count if len(problems) > 1 else "") + "\n".join(shown))


def read_file(path: Path, problems: list[str]) -> list[Row]:
    """The rows of a file. What is wrong with a line is added to `problems`, as "file:line: what is wrong"."""
    readers: dict[str, Callable[[Path, list[str]], Iterator[Row]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": _read_txt,
    }
    if path.suffix not in readers:
        raise ValueError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}.")
    refuse_pointer(path)
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


def _read_jsonl(path: Path, problems: list[str]) -> Iterator[Row]:
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
        yield from _object(where, value, problems)


def _read_json(path: Path, problems: list[str]) -> Iterator[Row]:
    try:
        values = json.loads(_text_of(path))
    except json.JSONDecodeError as error:
        problems.append(f"{path.name}:{error.lineno}: not JSON: {error.msg} at column {error.colno}")
        return
    if not isinstance(values, list):
        problems.append(f"{path.name}: expected a list of objects, found {kind(values)}")
        return
    for index, value in enumerate(values):
        yield from _object(f"{path.name}[{index}]", value, problems)


def _object(where: str, value: Any, problems: list[str]) -> Iterator[Row]:
    if isinstance(value, dict):
        yield Row(where, value)
    else:
        problems.append(f"{where}: expected an object {{…}}, found {kind(value)}")


def _read_csv(path: Path, problems: list[str]) -> Iterator[Row]:
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
        yield Row(where, {key: cell if cell != "" else None for key, cell in zip(header, cells, strict=True)})


def _read_parquet(path: Path, problems: list[str]) -> Iterator[Row]:
    import pyarrow.parquet

    for index, values in enumerate(pyarrow.parquet.read_table(path).to_pylist()):
        yield Row(f"{path.name} row {index + 1}", values)


def _read_txt(path: Path, problems: list[str]) -> Iterator[Row]:
    for number, line in enumerate(_text_of(path).split("\n"), 1):
        if line.strip():
            yield Row(f"{path.name}:{number}", {"text": line.rstrip("\r")})


def kind(value: Any) -> str:
    """What a value is, in the words of an error message."""
    names: dict[type, str] = {list: "a list", dict: "an object", str: "text", bool: "true or false", int: "a number",
                              float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)
