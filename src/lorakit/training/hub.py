"""Read the rows of a hub data set: which subset, which revision, and which splits are train, valid and test."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..core.errors import LoraError
from .folders import SPLIT_NAMES
from .rows import Row, of_columns

# Here the hub keeps a copy of a data set as files subset/split/*.parquet, even if its own files are a script.
_CONVERTED = "refs/convert/parquet"
_CONVERTED_FOLDER = "hf://datasets/{name}@refs%2Fconvert%2Fparquet"


@dataclass(frozen=True)
class Hub:
    """Which part of a hub data set is meant, if its id alone does not say."""

    subset: str | None = None  # its configuration
    revision: str | None = None
    splits: Mapping[str, str | None] = field(default_factory=dict)  # train, valid, test → the split's name there


def read_hub(name: str, hub: Hub) -> dict[str, list[Row]]:
    """The rows of each split of a data set.

    Raises ValueError for a subset or split that it does not have, and what `datasets` raises if the hub is not reached.
    """
    from datasets import load_dataset

    if hub.revision == _CONVERTED:
        files = _converted_files(name, hub.subset or "default")
        chosen = _chosen_splits(name, hub, files)
        loaded = load_dataset("parquet", data_files={own: files[own] for own in chosen.values()})
    else:
        loaded = load_dataset(name, hub.subset, revision=hub.revision)
        chosen = _chosen_splits(name, hub, loaded)
    splits: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for split, own in chosen.items():
        splits[split] = [Row(f"{name}/{own} row {i + 1}", of_columns(row)) for i, row in enumerate(loaded[own])]
    return splits


def is_cached(name: str) -> bool:
    """Whether this machine has an earlier copy of a data set, made by `datasets` or downloaded by the hub's client."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    made, fetched = name.replace("/", "___"), f"datasets--{name.replace('/', '--')}"
    return (Path(HF_DATASETS_CACHE) / made).is_dir() or (Path(HF_HUB_CACHE) / fetched).is_dir()


def _chosen_splits(name: str, hub: Hub, there: Collection[str]) -> dict[str, str]:
    """train, valid and test → the name of that split in the data set. If the user names splits, no others are used."""
    named = {split: own for split, own in hub.splits.items() if own is not None}
    # In reverse, so that the first of several usual names wins.
    usual = {split: stem for split, stems in SPLIT_NAMES.items() for stem in reversed(stems) if stem in there}
    chosen = {"train": "train", **(named or usual)}
    if missing := [own for own in chosen.values() if own not in there]:
        raise LoraError(f"{name} has no split {missing[0]!r}; it has {', '.join(there)}.")
    return chosen


def _converted_files(name: str, subset: str) -> dict[str, str]:
    """The splits in the hub's Parquet copy of a data set, and the pattern of each one's files.

    load_dataset does not take the folders of that revision for subsets, so it is given their files.
    """
    from fsspec.core import url_to_fs

    root = _CONVERTED_FOLDER.format(name=name)
    files, path = url_to_fs(root)
    folders = [file.split("/")[-3:-1] for file in sorted(files.glob(f"{path}/*/*/*.parquet"))]
    splits = list(dict.fromkeys(split for own, split in folders if own == subset))
    if not splits:
        subsets = ", ".join(dict.fromkeys(own for own, _ in folders)) or "none"
        raise LoraError(f"{name} has no subset {subset!r} in its Parquet copy; it has {subsets}.")
    return {split: f"{root}/{subset}/{split}/*.parquet" for split in splits}
