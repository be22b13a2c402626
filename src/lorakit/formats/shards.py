"""A model's safetensors files, read and written one tensor at a time: no file is ever whole in memory.

    8 bytes     the length of the header, little-endian
    header      JSON: tensor → dtype, shape, and where it begins and ends behind the header; "__metadata__": texts
    tensors     one after the other, without gaps

A model has one file, `model.safetensors`, or several and an index that says which tensor is in which
(https://huggingface.co/docs/safetensors). A tensor that stays as it is goes from file to file inside the kernel.

Files are read and not mapped: the pages of a map count as the process's memory.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..core.errors import LoraError
from ..core.reading import json_of, refuse_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Of the types that an update can be added to, and of BatchNorm's count; tensors of other types are only carried over.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_BITS = {"BOOL": 8, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}  # of the types whose names do not say it
# Bytes that are written at once. Linux 6.18 (ext4) took 0.2 s for each GB in pieces of 1 MB, and 2 s in pieces of 8 MB.
_CHUNK = 1 << 20
_NOT_IN_THE_KERNEL = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, and the bytes [begin, begin + size) of it. dtype: as the header says it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    size: int

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for a type that is only carried over."""
        return DTYPES.get(self.dtype)

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        return self.read_rows(0, self.shape[0]) if self.shape else self._read(self.begin, ())

    def read_rows(self, first: int, count: int) -> Tensor:
        """`count` of its entries along the first dimension, from `first` on."""
        row = self.size // max(self.shape[0], 1)
        return self._read(self.begin + first * row, (count, *self.shape[1:]))

    def _read(self, begin: int, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(shape, dtype=DTYPES[self.dtype])
        with self.path.open("rb", buffering=0) as file:
            file.seek(begin)
            _fill(file, raw_bytes(tensor), self.path)
        return tensor


@dataclass(frozen=True)
class Shards:
    """All tensors of a model's folder, by name, and what its files say besides."""

    folder: Path
    files: tuple[str, ...]
    tensors: dict[str, Entry]
    metadata: dict[str, dict[str, str]]  # of each file
    index: dict[str, Any] | None = None  # what the index says beside the files of the tensors

    def inside(self, file: str) -> list[str]:
        """The tensors of a file, in its order."""
        own = self.folder / file
        return sorted(
            (name for name, entry in self.tensors.items() if entry.path == own),
            key=lambda name: self.tensors[name].begin,
        )


def shards_of(folder: Path) -> Shards:
    """The safetensors files of a model's folder; their headers are read.

    Raises FileNotFoundError where a file is missing, LoraError for one that is cut short or says what is not so.
    """
    listed: dict[str, Any] | None = None
    if (folder / INDEX).is_file():
        listed = json_of(folder / INDEX, dict)
        homes = listed.pop("weight_map", None)
        if not isinstance(homes, dict) or not all(_is_file_name(file) for file in homes.values()):
            raise LoraError(f"{folder / INDEX}: weight_map does not say which tensor is in which file.")
        files = tuple(sorted(set(homes.values())))
    elif (folder / SINGLE).is_file():
        files = (SINGLE,)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {SINGLE} nor {INDEX}: only a model's safetensors files can be merged file by file."
        )
    if missing := [file for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(
            f"{folder / INDEX} names {missing[0]}, which is not there"
            + (f" ({len(missing)} of {len(files)} files are missing)." if len(missing) > 1 else ".")
        )
    tensors: dict[str, Entry] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in files:
        metadata[file], own = read_header(folder / file)
        if twice := tensors.keys() & own.keys():
            raise LoraError(f"{folder}: {min(twice)} is in {tensors[min(twice)].path.name} and in {file}.")
        tensors |= own
    if listed is not None and (lost := sorted(name for name in homes if name not in tensors)):
        raise LoraError(f"{folder / INDEX}: {lost[0]} is not in {homes[lost[0]]}.")
    return Shards(folder, files, tensors, metadata, listed)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Entry]]:
    """The texts in a safetensors file's header, and its tensors. Raises LoraError where file and header disagree."""
    refuse_pointer(path)
    whole = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if whole < 8 or length > whole - 8:
            raise LoraError(f"{path}: not a complete safetensors file.")
        header = file.read(length)
    try:
        said = json.loads(header)
        metadata = dict(said.pop("__metadata__", {}))
        tensors = {name: _entry(path, 8 + length, own) for name, own in said.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoraError(f"{path}: not a safetensors file ({error}).") from None
    end = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if entry.begin != end or math.prod(entry.shape) * _bits(entry.dtype) != 8 * entry.size:
            raise LoraError(f"{path}: {name} has a shape or a place that cannot be.")
        end = entry.begin + entry.size
    if end != whole:
        raise LoraError(f"{path}: not a complete safetensors file: {whole:,} bytes, its header tells of {end:,}.")
    return metadata, tensors


@dataclass(frozen=True)
class Planned:
    """A tensor of a file that is to be written. dtype: as the header says it."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @classmethod
    def of(cls, tensor: Tensor) -> Planned:
        return cls(CODES[tensor.dtype], tuple(tensor.shape))


@dataclass
class ShardWriter:
    """Writes a safetensors file: the header, then each tensor when it is given, in the order of `tensors`."""

    path: Path
    tensors: Mapping[str, Planned]
    metadata: Mapping[str, str]
    _left: list[str] = field(default_factory=list)

    @staticmethod
    def in_order(tensors: Mapping[str, Planned]) -> dict[str, Planned]:
        """The order in which they are written: types of more bytes first, so that each begins at a multiple of them."""
        return dict(sorted(tensors.items(), key=lambda item: -_bits(item[1].dtype)))

    def __enter__(self) -> ShardWriter:
        self._left = list(self.tensors)[::-1]
        self._file = self.path.open("wb", buffering=0)
        _write_all(self._file, memoryview(header_of(self.tensors, self.metadata)))
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        self._next(name, Planned.of(tensor))
        tensor = tensor.contiguous()
        _write_all(self._file, raw_bytes(tensor))

    def carry(self, name: str, entry: Entry) -> None:
        """The next tensor, from another file."""
        self._next(name, Planned(entry.dtype, entry.shape))
        with entry.path.open("rb", buffering=0) as source:
            source.seek(entry.begin)
            _carry(source, self._file, entry.size, entry.path)

    def _next(self, name: str, found: Planned) -> None:
        expected = self._left.pop()
        assert (name, found) == (expected, self.tensors[expected]), f"{name} {found}, expected {expected}"


def header_of(tensors: Mapping[str, Planned], metadata: Mapping[str, str]) -> bytearray:
    """The beginning of a file that holds these tensors, padded so that they begin at a multiple of 8 bytes."""
    said: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, own in tensors.items():
        said[name] = {"dtype": own.dtype, "shape": list(own.shape), "data_offsets": [end, end + own.size]}
        end += own.size
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return bytearray(len(text).to_bytes(8, "little") + text)


def same_bytes(first: Entry, second: Entry, window: int = 1 << 16) -> bool:
    """Whether two tensors have the same bytes at their beginning and at their end."""
    size = min(window, first.size)
    parts = []
    for entry in (first, second):
        with entry.path.open("rb", buffering=0) as file:
            for begin in (entry.begin, entry.begin + entry.size - size):
                file.seek(begin)
                parts.append(file.read(size))
    return first.size == second.size and parts[:2] == parts[2:]


def total_size(tensors: Iterable[Planned]) -> int:
    """Bytes of all of them."""
    return sum(own.size for own in tensors)


def _entry(path: Path, start: int, said: Mapping[str, Any]) -> Entry:
    begin, end = said["data_offsets"]
    return Entry(path, said["dtype"], tuple(map(int, said["shape"])), start + begin, end - begin)


def _bits(dtype: str) -> int:
    """BF16, F8_E4M3, I64, …: how many bits a number has."""
    digits = dtype.partition("_")[0].lstrip("BFIU")
    if dtype not in _BITS and not digits.isdigit():
        raise LoraError(f"tensors of type {dtype} are not known.")
    return _BITS.get(dtype) or int(digits)


def _is_file_name(name: Any) -> bool:
    """Whether a name in the index stays inside the folder."""
    return isinstance(name, str) and Path(name).name == name


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, as long as the tensor lives."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    if not tensor.numel():
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _fill(file: Any, target: memoryview, path: Path) -> None:
    while len(target):
        count = file.readinto(target)
        if not count:
            raise LoraError(f"{path} became shorter while it was read.")
        target = target[count:]


def _write_all(file: Any, data: memoryview) -> None:
    while len(data):
        data = data[file.write(data[:_CHUNK]) :]


def _carry(source: BinaryIO, target: BinaryIO, size: int, path: Path) -> None:
    """Copy `size` bytes from where one file stands to where the other does."""
    in_kernel = hasattr(os, "copy_file_range")
    buffer = memoryview(b"")
    while size:
        count = 0
        if in_kernel:
            try:
                count = os.copy_file_range(source.fileno(), target.fileno(), size)
            except OSError as error:
                if error.errno not in _NOT_IN_THE_KERNEL:
                    raise
            in_kernel = count > 0  # some file systems say nothing and copy nothing
        if not count:
            buffer = buffer or memoryview(bytearray(min(_CHUNK, size)))
            count = min(len(buffer), size)
            _fill(source, buffer[:count], path)
            _write_all(target, buffer[:count])
        size -= count
