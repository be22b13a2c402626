"""Rows that may be more than memory holds: a list while they are few, and a file as soon as they are many.

A spool grows by `append` and is then a sequence: it has a length, is indexed and read in order. In memory it keeps
eight bytes of a row, the place where it begins in the file. The file has no name and is gone when the spool is.
"""

from __future__ import annotations

import array
import contextlib
import os
import pickle
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

T = TypeVar("T")
U = TypeVar("U")
_FEW = 10_000  # rows that stay in memory
_BUFFER = 1 << 20  # bytes


class Spool(Generic[T], Sequence[T]):
    """A sequence of rows (anything that can be pickled) that grows at its end."""

    def __init__(self, rows: Iterable[T] = ()) -> None:
        self._few: list[T] | None = []
        self._file: Any = None
        self._ends = array.array("q", [0])  # row i is in the bytes [ends[i], ends[i + 1])
        self._waiting = bytearray()
        for row in rows:
            self.append(row)

    def append(self, row: T) -> None:
        if self._few is not None:
            self._few.append(row)
            if len(self._few) > _FEW:
                few, self._few = self._few, None
                self._file = tempfile.TemporaryFile(prefix="lorakit-")  # noqa: SIM115  open as long as the spool
                weakref.finalize(self, self._file.close)
                for own in few:
                    self.append(own)
            return
        data = pickle.dumps(row, protocol=pickle.HIGHEST_PROTOCOL)
        self._ends.append(self._ends[-1] + len(data))
        self._waiting += data
        if len(self._waiting) >= _BUFFER:
            self._write()

    def settled(self) -> Sequence[T]:
        """The rows: a plain list if they are few, or else this spool."""
        return self if self._few is None else self._few

    def __len__(self) -> int:
        return len(self._ends) - 1 if self._few is None else len(self._few)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if self._few is not None:
            return self._few[index]
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._read(place, place + 1)[0]

    def __iter__(self) -> Iterator[T]:
        if self._few is not None:
            yield from self._few
            return
        for start in range(0, len(self), 256):
            yield from self._read(start, min(start + 256, len(self)))

    def _read(self, start: int, stop: int) -> list[T]:
        self._write()
        begin = self._ends[start]
        # Without moving the file's position, which forked processes share.
        data = os.pread(self._file.fileno(), self._ends[stop] - begin, begin)
        view = memoryview(data)
        return [pickle.loads(view[self._ends[i] - begin : self._ends[i + 1] - begin]) for i in range(start, stop)]

    def _write(self) -> None:
        if self._waiting:
            self._file.seek(0, os.SEEK_END)
            self._file.write(self._waiting)
            self._file.flush()
            self._waiting.clear()


class Picked(Sequence[T]):
    """Rows of a sequence, by their indices; the rows stay where they are."""

    def __init__(self, rows: Sequence[T], indices: Sequence[int]) -> None:
        self._rows, self._indices = rows, array.array("q", indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._rows[place] for place in self._indices[index]]
        return self._rows[self._indices[index]]


class Viewed(Sequence[U], Generic[T, U]):
    """Rows of a sequence as `change` makes them whenever they are read."""

    def __init__(self, rows: Sequence[T], change: Callable[[T], U]) -> None:
        self._rows, self._change = rows, change

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[U]:
        return map(self._change, self._rows)

    @overload
    def __getitem__(self, index: int) -> U: ...
    @overload
    def __getitem__(self, index: slice) -> list[U]: ...
    def __getitem__(self, index: int | slice) -> U | list[U]:
        if isinstance(index, slice):
            return [self._change(row) for row in self._rows[index]]
        return self._change(self._rows[index])


def viewed(rows: Sequence[T], change: Callable[[T], U]) -> Sequence[U]:
    """The rows as `change` makes them: a list of a list, and a view of a spool."""
    return [change(row) for row in rows] if isinstance(rows, list) else Viewed(rows, change)


@contextlib.contextmanager
def as_dataset(rows: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """The rows as a data set of the library `datasets`. Many of them lie in a file, which is gone after the block."""
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    if isinstance(rows, list):
        yield Dataset.from_list(rows)
    elif isinstance(rows, Dataset):
        yield rows
    else:
        with tempfile.TemporaryDirectory(prefix="lorakit-") as folder:
            path = os.path.join(folder, "rows.arrow")
            with ArrowWriter(path=path, writer_batch_size=1000) as writer:
                for row in rows:
                    writer.write(row)
                writer.finalize()
            yield Dataset.from_file(path)


def picked(rows: Sequence[T], indices: Sequence[int]) -> Sequence[T]:
    """The rows at these indices: a list of a list, and a view of a spool."""
    return [rows[index] for index in indices] if isinstance(rows, list) else Picked(rows, indices)
