"""Read the rows of a file (JSON, CSV, Parquet or plain text, compressed or not), and report lines that are not rows.

A file is read to its end, so every bad line is reported with its place. The text of a JSON file, not the file's name,
decides its layout (a list, an object a line, rows under a key). Lines of JSON, CSV and Parquet are read in a stream, so
the memory does not grow with the file. Other layouts of JSON are read whole.
"""

from __future__ import annotations

import bz2
import decimal
import gzip
import io
import itertools
import json
import lzma
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from ..core.errors import LoraError
from ..core.reading import bytes_of, decoded, refuse_pointer
from ..core.words import first_line
from . import tables

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
_UNPACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# Keys under which a file that is one object holds its rows.
_HOLDS_ROWS = ("data", "rows", "examples", "items", "records", "instances", "samples", "train", "valid", "test")
_LISTED = 20  # causes in a message
_PLACES = 10  # further rows named for one cause


@dataclass(frozen=True)
class Row:
    """The keys and values of one row, and its place: "train.jsonl:3"."""

    where: str
    values: dict[str, Any]


@dataclass
class Findings:
    """What reading found: lines that are not rows ("file:line: what is wrong"), notes for the user, and the adapters
    that rows name to learn them.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    learners: set[str] = field(default_factory=set)


class DataError(LoraError):
    """Rows that cannot be used. The message gives each cause once, with the places of the rows that have it.

    problems: a line for each row, "file:line: what is wrong".
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(sorted(problems, key=_place))
        causes: dict[str, list[str]] = {}
        for problem in self.problems:
            # Problems that differ only in a number (of a column, of a message) have one cause.
            cause = re.sub(r"\d+", "#", problem.partition(": ")[2] or problem)
            causes.setdefault(cause, []).append(problem)
        lines = [alike[0] + _also(alike[1:]) for alike in causes.values()]
        if len(lines) > _LISTED:
            lines[_LISTED:] = [f"... and {len(lines) - _LISTED} other causes"]
        count = f"{len(problems)} bad rows; nothing was loaded:\n" if len(problems) > 1 else ""
        super().__init__(count + "\n".join(lines))


def _also(problems: Sequence[str]) -> str:
    if not problems:
        return ""
    places = [problem.partition(": ")[0] for problem in problems]
    more = f" and {len(places) - _PLACES} more rows" if len(places) > _PLACES else ""
    return f"\n    also {', '.join(places[:_PLACES])}{more}"


def _place(problem: str) -> list[str | int]:
    """A sort key: the file and the line at the beginning of a problem, with 9 before 10."""
    parts = re.split(r"(\d+)", problem.partition(": ")[0])
    return [int(part) if part.isdecimal() else part for part in parts]


def read_file(path: Path, findings: Findings) -> Iterator[Row]:
    """The rows of a file, read while they are taken. What is wrong with a line is added to the findings.

    Raises ValueError for an unknown kind of file, and DataError for a file that cannot be read at all.
    """
    suffix, _ = suffixes(path)
    if suffix is None:
        raise LoraError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}, or one packed with gzip.")
    before, count = len(findings.problems), 0
    for row in _rows_of(path, suffix, findings):
        count += 1
        yield row
    if not count and len(findings.problems) == before:
        findings.problems.append(f"{path.name}: the file holds no rows.")


def _rows_of(path: Path, suffix: str, findings: Findings) -> Iterator[Row]:
    refuse_pointer(path)
    if suffix == ".parquet":
        yield from _read_parquet(path, findings)
        return
    try:
        with _lines_of(path) as lines:
            if suffix in (".csv", ".tsv"):
                delimiter = "\t" if suffix == ".tsv" else ","
                cells = tables.read_cells(
                    path.name, lines, delimiter, findings.problems, findings.notes, lambda: _text_of(path)
                )
                yield from (Row(where, values) for where, values in cells)
            elif suffix == ".txt":
                yield from _read_txt(path.name, lines)
            else:
                yield from _read_lines(path, lines, findings)
    except (UnicodeError, EOFError, OSError, zlib.error, lzma.LZMAError):
        _text_of(path)  # says what is wrong with the file, and where
        raise


def suffixes(path: Path) -> tuple[str | None, str]:
    """The kind of file by its name (one of SUFFIXES, or None), and the suffix of its compression, or ""."""
    last = path.suffix.lower()
    packing = last if last in _UNPACK else ""
    kind_of_file = Path(path.stem).suffix.lower() if packing else last
    return (kind_of_file if kind_of_file in SUFFIXES else None), packing


def kind(value: Any) -> str:
    """What a value is, in the words of an error message."""
    names: dict[type, str] = {list: "a list", dict: "an object", str: "text", bool: "true or false", int: "a number",
                              float: "a number", type(None): "null"}  # fmt: skip
    return names.get(type(value), type(value).__name__)


# --- bytes and text ------------------------------------------------------------------------------------------------


def _bytes_of(path: Path) -> bytes:
    data = bytes_of(path)
    _, packing = suffixes(path)
    if not packing:
        return data
    try:
        return _UNPACK[packing](data)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise DataError([f"{path.name}: not a whole {packing} file: {error}"]) from None


def _text_of(path: Path) -> str:
    data = _bytes_of(path)
    try:
        return decoded(data, path.name)
    except ValueError as error:
        raise DataError([str(error)]) from None


def _lines_of(path: Path) -> TextIO:
    """The lines of a file with their ends, which are line feeds, carriage returns, or both."""
    _, packing = suffixes(path)
    # newline="" does not change what stands in quoted cells, and ends no line at U+2028, form feeds and others.
    return _OPEN.get(packing, io.open)(path, "rt", encoding="utf-8-sig", newline="")  # type: ignore[no-any-return]


def _read_txt(name: str, lines: Iterable[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield Row(f"{name}:{number}", {"text": line.rstrip("\r\n")})


# --- JSON ----------------------------------------------------------------------------------------------------------


def _read_lines(path: Path, lines: TextIO, findings: Findings) -> Iterator[Row]:
    """The rows of a file with an object on each line, in a stream; one of another layout is read whole."""
    name = path.name
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    ahead: deque[tuple[int, str]] = deque(itertools.islice(numbered, 2))
    if len(ahead) < 2 or any(_object_in(line) is None for _, line in ahead):
        yield from _read_json(name, _text_of(path), findings)
        return
    while ahead:
        number, line = ahead.popleft()
        ahead.extend(itertools.islice(numbered, 2 - len(ahead)))
        value = _object_in(line)
        if value is None and ahead and _object_in(ahead[0][1]) is None and _error_in(ahead[0][1]) is not None:
            # Neither this line nor the next one is JSON by itself: perhaps the two are parts of one value.
            rest = line + "".join(text for _, text in ahead) + lines.read()
            yield from _read_json(name, rest, findings, first=number)
            return
        if value is None:
            if (error := _error_in(line)) is not None:
                findings.problems.append(f"{name}:{number}: not JSON: {_reason(error)}")
                continue
            yield from _read_json(name, line, findings, first=number)  # no object, or several
            continue
        yield from _sound([(f"{name}:{number}", value)], line, findings)


def _object_in(line: str) -> dict[str, Any] | None:
    """The one object that a line holds; None for any other line."""
    try:
        value = _DECODER.decode(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _error_in(line: str) -> Exception | None:
    try:
        for _ in _values(line):
            pass
    except (ValueError, RecursionError) as error:
        return error
    return None


def _read_json(name: str, text: str, findings: Findings, first: int = 1) -> Iterator[Row]:
    """The rows in a text, which begins at the line `first` of its file."""
    problems: list[str] = []
    values: list[tuple[str, Any]] = []
    try:
        values = [(f"{name}:{line}", value) for line, value in _values(text, first)]
    except (ValueError, RecursionError) as error:
        values = _by_lines(name, text, problems, first)
        if len(values) <= len(problems) and not _an_object_a_line(text):  # one value over many lines
            values, problems = [], [f"{name}{_line_of(error, first)}: not JSON: {_reason(error)}"]
    findings.problems += problems
    if len(values) == 1 and first == 1:
        values = _held(name, values[0][1], findings) or values
    yield from _sound(values, text, findings)


def _sound(values: Iterable[tuple[str, Any]], text: str, findings: Findings) -> Iterator[Row]:
    """The rows among the values of a text."""
    # Only an escape can give a lone surrogate: the text itself is UTF-8.
    escapes = "\\ud" in text.lower()
    for where, value in values:
        if not isinstance(value, dict):
            findings.problems.append(f"{where}: expected an object {{…}}, found {kind(value)}")
        elif escapes and (half := _lone_surrogate(value)):
            problem = f"the text {half} holds half a character (an escape \\ud… without its pair)"
            findings.problems.append(f"{where}: {problem}")
        else:
            yield Row(where, value)


def _values(text: str, first: int = 1) -> Iterator[tuple[int, Any]]:
    """The values that stand one after another in a text, each with its line. Raises what `json` raises."""
    end, line, seen = 0, first, 0
    while (start := _BLANK.match(text, end).end()) < len(text):  # type: ignore[union-attr]
        line += text.count("\n", seen, start)
        value, end = _DECODER.raw_decode(text, start)
        seen = start
        yield line, value


def _by_lines(name: str, text: str, problems: list[str], first: int) -> list[tuple[str, Any]]:
    """The value on each line; what is wrong with a line goes to the problems."""
    values = []
    for number, line in enumerate(io.StringIO(text, newline=None), first):
        if line.strip():
            try:
                values.append((f"{name}:{number}", _DECODER.decode(line.rstrip("\n"))))
            except (ValueError, RecursionError) as error:
                problems.append(f"{name}:{number}: not JSON: {_reason(error)}")
    return values


def _an_object_a_line(text: str) -> bool:
    lines = [line.lstrip() for line in text.split("\n") if line.strip()]
    return 2 * sum(line.startswith("{") for line in lines) > len(lines) and not lines[0].startswith("[")


def _held(name: str, value: Any, findings: Findings) -> list[tuple[str, Any]]:
    """The rows inside the one value of a file: a list, or an object with a list of rows."""
    if isinstance(value, list):
        return [(f"{name}[{index}]", row) for index, row in enumerate(value)]
    if not isinstance(value, dict):
        return []
    lists = [key for key in value if key.lower() in _HOLDS_ROWS and _are_objects(value[key])]
    if len(lists) > 1:
        findings.notes.append(f"{name}: of its lists {', '.join(lists)} the first is read; save each as its own file")
    return [(f"{name} {lists[0]}[{i}]", row) for i, row in enumerate(value[lists[0]])] if lists else []


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _unlike_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise LoraError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return found


def _line_of(error: Exception, first: int) -> str:
    return f":{error.lineno + first - 1}" if isinstance(error, json.JSONDecodeError) else ""


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "it is nested too deep" if isinstance(error, RecursionError) else str(error)


def _lone_surrogate(value: Any) -> str | None:
    """A text inside a value that UTF-8 cannot encode, as Python's ascii() writes it; or None."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return ascii(value[max(error.start - 10, 0) : error.start + 10])
        return None
    parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return next(filter(None, map(_lone_surrogate, parts)), None)


_BLANK = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder(object_pairs_hook=_unlike_keys)


# --- columns -------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path, findings: Findings) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    packed = bool(suffixes(path)[1])
    try:
        with pyarrow.parquet.ParquetFile(io.BytesIO(_bytes_of(path)) if packed else path) as file:
            if twice := tables.twice(file.schema_arrow.names):
                findings.problems.append(f"{path.name}: the column {twice!r} stands there twice")
                return
            index = 0
            for batch in file.iter_batches(1024):
                for values in batch.to_pylist(maps_as_pydicts="strict"):
                    index += 1
                    yield Row(f"{path.name} row {index}", of_columns(values))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        findings.problems.append(f"{path.name}: cannot be read as Parquet: {first_line(error)}")


def of_columns(values: dict[str, Any]) -> dict[str, Any]:
    """A row of a table with typed columns as JSON would hold it.

    Inside a column all objects have the same keys, and null stands for a key that is not there.
    """
    return {key: _of_column(value) for key, value in values.items()}


def _of_column(value: Any) -> Any:
    if isinstance(value, decimal.Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, dict):
        return {key: _of_column(own) for key, own in value.items() if own is not None}
    return [_of_column(own) for own in value] if isinstance(value, list) else value
