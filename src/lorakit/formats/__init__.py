"""Adapters in files: `save` and `load`, the compositions of a model's `Adapter` with a format.

peft       a folder with adapter_config.json and adapter_model.safetensors; the default
loralib    a .pt file
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal

from torch import nn

from ..core.adapter import Adapter
from ..core.attach import adapted_layers
from ..core.exchange import extract, insert, layouts
from ..core.host import Host
from ..core.unused import idle_note, refuse_silent
from . import loralib, peft
from .foreign import refuse
from .renamed import translated

Format = Literal["peft", "loralib"]
_LORALIB_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def save(model: nn.Module, path: str | Path, *, force: bool = False) -> None:
    """Write the adapter of `model`: a folder in PEFT's format, or loralib's when `path` ends in .pt (.pth, .bin).

    The same whether the model is merged or not. Other files in the folder are left alone. Raises ValueError where
    training passed over an adapted layer, or one is gone (see `diagnose`); with force the rest is written all the same.
    Warns of parts of the model that training never used.
    """
    if not force:
        layers = adapted_layers(model)
        refuse_silent(model, layers, "Leave them out of the targets, or save with force=True.")
        if note := idle_note(model, layers):
            warnings.warn(f"{note}\nTheir updates are saved as they were before training.", stacklevel=2)
    adapter = extract(model, force=force)
    if _format_of(Path(path)) == "loralib":
        loralib.write(adapter, path)
    else:
        peft.write(adapter, path)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    format: Format | None = None,
    alpha: float | None = None,
    force: bool = False,
) -> Adapter:
    """Put the adapter at `path` into `model`, which may be adapted already or not; returns what was read.

    format: by default told by the path. alpha: needed for loralib's files, which do not hold it. force: leave out
    what does not fit the model instead of refusing it. Nothing is fetched from a network.
    """
    path = Path(path)
    if (format or _format_of(path)) == "loralib":
        adapter = loralib.read(path, alpha, layouts(model))
    else:
        adapter = read_for(model, path)
    try:
        insert(model, adapter, force=force)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return adapter


def read_for(model: nn.Module, path: str | Path) -> Adapter:
    """The adapter in PEFT's folder at `path` (or whose tensors are the file `path`), by the names that `model` has."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter folder.")
    host = Host(model)
    folder = path.parent if path.name in peft.FILES else path
    if folder.is_file():
        refuse(folder)
    return translated(peft.read(folder, host), host)


def _format_of(path: Path) -> Format:
    of_loralib = path.suffix in _LORALIB_SUFFIXES and path.name not in peft.FILES and not path.is_dir()
    return "loralib" if of_loralib else "peft"
