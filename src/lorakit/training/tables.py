"""Read CSV and TSV: cells by the names in the header, with the line of each row and of each misplaced quotation mark.

Quotation marks are read strictly. One that is never closed would swallow the rows after it and teach them as an answer,
so it is an error at its line.
"""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Sequence

_LONGEST = 2**31 - 1  # characters of a cell (csv's default is 131,072); fits a C long on every system


def read_cells(
    name: str,
    lines: Iterable[str],
    delimiter: str,
    problems: list[str],
    notes: list[str],
    whole: Callable[[], str],
) -> Iterator[tuple[str, dict[str, str | None]]]:
    """The place and the cells of each row; an empty cell is None. What is wrong goes to `problems`.

    lines: of the file, with their ends. whole: the file's text, for a message.
    """
    with _long_cells():
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        swallowed: list[str] = []
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                every = list(io.StringIO(whole(), newline=""))
                problems.append(_misplaced(name, every, delimiter, start, reader.line_num, error))
                if header is None:
                    return
                continue
            if not cells:
                continue
            where = f"{name}:{start}"
            if header is None:
                header = [cell.strip() for cell in cells]
                if problem := _bad_header(header):
                    problems.append(f"{where}: {problem}")
                    return
            elif len(cells) != len(header):
                spans = (
                    f", in the lines {start} to {reader.line_num} (is a quotation mark missing?)"
                    if reader.line_num > start
                    else ""
                )
                problems.append(f"{where}: {len(cells)} cells{spans}, but the header has {len(header)}")
            else:
                if any(_looks_like_rows(cell, delimiter, len(header)) for cell in cells):
                    swallowed.append(where)
                yield where, {key: cell if cell != "" else None for key, cell in zip(header, cells, strict=True)}
        if swallowed:
            more = f" and {len(swallowed) - 3} more" if len(swallowed) > 3 else ""
            notes.append(
                f"cells that span lines which look like rows themselves ({', '.join(swallowed[:3])}{more}): is a "
                "quotation mark missing there?"
            )


def twice(names: Sequence[str]) -> str | None:
    """The first name that stands in a list more than once."""
    return next((name for index, name in enumerate(names) if name in names[:index]), None)


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Within the block, csv reads cells of any length. The limit is that of the whole process."""
    limit = csv.field_size_limit(_LONGEST)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _bad_header(header: list[str]) -> str | None:
    if (name := twice(header)) is not None:
        return f"the column {name!r} stands in the header twice"
    if len(header) == 1:
        for mark, remedy in ((";", "save the file with commas"), ("\t", "call the file .tsv")):
            if mark in header[0]:
                return f"the header is one cell, {header[0]!r}; cells seem to be separated by {mark!r}: {remedy}"
    return None


def _misplaced(name: str, lines: list[str], delimiter: str, start: int, end: int, error: csv.Error) -> str:
    """What is wrong with the quotation marks of the row from line `start`, where reading stopped at line `end`."""
    if str(error) == "unexpected end of data":
        *_, cell = next(csv.reader(lines[start - 1 :], delimiter=delimiter))
        swallowed = len(list(io.StringIO(cell, newline="")))  # lines, that of the mark included
        mark = len(lines) - max(swallowed, 1) + 1
        return f'{name}:{mark}: a quotation mark (") opens a cell here and none closes it'
    if "expected after" in str(error):
        spans = f" (it goes on to line {end})" if end > start else ""
        return (
            f'{name}:{start}: a quotation mark (") inside a quoted cell{spans}; inside of one it is written twice, and '
            "one that is meant as it stands needs a quoted cell"
        )
    return f"{name}:{start}: not CSV: {error}"


def _looks_like_rows(cell: str, delimiter: str, columns: int) -> bool:
    """Whether a line inside a cell has as many delimiters as a row: an opening mark may have swallowed it."""
    inner = cell.split("\n")[1:-1]
    return columns > 1 and bool(inner) and all(line.count(delimiter) == columns - 1 for line in inner)
