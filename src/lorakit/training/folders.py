"""Find the files of each split: train.jsonl, Test.csv, validation.json.gz, train-00000-of-00002.parquet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..core.errors import LoraError
from .rows import SUFFIXES, suffixes

# The file names of each split, the usual one first.
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
_SHARD = re.compile(r"[-_.]0*(\d+)(?:[-_]of[-_]0*(\d+))?$")


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder, or in its folder data/ if it has none itself. Shards are in their order.

    Raises ValueError if two files could be the same split, or if a shard is missing.
    """
    for place in (folder, folder / "data"):
        files = sorted(entry for entry in place.iterdir() if entry.is_file()) if place.is_dir() else []
        found = {split: _of_split(place, files, stems) for split, stems in SPLIT_NAMES.items()}
        if any(found.values()):
            return found
    return {split: [] for split in SPLIT_NAMES}


def no_split(folder: Path, wanted: str) -> FileNotFoundError:
    """The error for a folder without the file of a split. It names the data files that are there."""
    there = [entry.name for entry in sorted(folder.iterdir()) if entry.is_file() and suffixes(entry)[0]]
    hint = f" It holds {', '.join(there[:5])}: name the file, --data {folder / there[0]}" if there else ""
    return FileNotFoundError(f"{folder} holds no {wanted} file ({', '.join(SUFFIXES)}).{hint}")


def passed_over(found: dict[str, list[Path]]) -> list[str]:
    """Names of data files beside those of the splits. A .txt file does not count; a .json file does."""
    read = {path for files in found.values() for path in files}
    beside = [entry for place in {path.parent for path in read} for entry in sorted(place.iterdir())]
    return [entry.name for entry in beside if suffixes(entry)[0] not in (None, ".txt") and entry not in read]


def _of_split(folder: Path, files: Sequence[Path], stems: Sequence[str]) -> list[Path]:
    groups: dict[tuple[str, str], list[tuple[int, Path]]] = {}
    counts: dict[tuple[str, str], int] = {}
    for path in files:
        if suffixes(path)[0] is None:
            continue
        name, ending = _parts(path)
        shard = _SHARD.search(name)
        stem = name[: shard.start()] if shard else name
        if stem.lower() in stems:
            group = (stem, ending + ("/" if shard else ""))
            groups.setdefault(group, []).append((int(shard[1]) if shard else 0, path))
            if shard and shard[2]:
                counts[group] = int(shard[2])
    if len(groups) > 1:
        usual = sorted(groups, key=lambda group: (stems.index(group[0].lower()), SUFFIXES.index(_kind(group, groups))))
        one, two = (groups[group][0][1].name for group in usual[:2])
        raise LoraError(f"{folder} holds both {one} and {two}; keep one, or name the file.")
    for group, shards in groups.items():
        if (count := counts.get(group)) is not None and len(shards) != count:
            raise LoraError(f"{folder} holds {len(shards)} of the {count} files {group[0]}-…-of-…{group[1][:-1]}.")
        return [path for _, path in sorted(shards)]
    return []


def _kind(group: tuple[str, str], groups: dict[tuple[str, str], list[tuple[int, Path]]]) -> str:
    return suffixes(groups[group][0][1])[0] or ""


def _parts(path: Path) -> tuple[str, str]:
    """The name without its suffixes of kind and compression, and those suffixes."""
    kind, packing = suffixes(path)
    ending = path.name[-len((kind or "") + packing) :]
    return path.name[: -len(ending)], ending
