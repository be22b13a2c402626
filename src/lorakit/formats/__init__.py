"""Adapters in files: `save` and `load`, the compositions of a model's `Adapter` with a format (`core/format.py`).

peft       a folder with adapter_config.json and adapter_model.safetensors; the default
peft-0.18  the same, with experts as PEFT up to 0.18.1 reads them
loralib    a .pt file
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from ..core.adapter import Adapter as Adapter  # with the formats below, which its `load` and `save` use
from ..core.attach import adapted_layers
from ..core.errors import LoraError
from ..core.exchange import extract, insert
from ..core.format import add_format, format_of
from ..core.host import Host
from ..core.sharded import writes
from ..core.unused import idle_note, refuse_silent
from . import loralib, peft, peft_0_18
from .renamed import translated
from .unfused import unfused

Experts = Literal["stacked", "per-expert"]

add_format(peft)  # asked last
add_format(peft_0_18)
add_format(loralib)


def save(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    experts: Experts = "stacked",
    force: bool = False,
) -> None:
    """Write the adapter of `model`: a folder in PEFT's format, or loralib's when `path` ends in .pt (.pth, .bin).

    format: its name; by default the path tells. experts: "per-expert" writes a pair for each layer of each expert, with
    the names of transformers 4, as vLLM (for most models) and llama.cpp's converter read them.

    The file is the same whether the model is merged or not. Other files in the folder are left alone. Raises LoraError
    if training passed over an adapted layer, or if one is gone (see `diagnose`); with force, the adapter is written
    without the layers that are gone. Warns of parts of the model that training never used. A sharded model (FSDP2) is
    saved by every process at the same time, and the first one writes.
    """
    if not force:
        layers = adapted_layers(model)
        refuse_silent(model, layers, "Leave them out of the targets, or save with force=True.")
        if note := idle_note(model, layers):
            warnings.warn(f"{note}\nTheir updates are saved as they were before training.", stacklevel=2)
    if experts not in get_args(Experts):
        raise LoraError(f"experts={experts!r}: expected one of {', '.join(map(repr, get_args(Experts)))}.")
    adapter = extract(model, force=force)
    if experts == "per-expert":
        adapter = unfused(adapter, Host(model))
    if writes(model):
        adapter.save(path, format=format)


def load(
    model: nn.Module,
    path: str | Path,
    *,
    format: str | None = None,
    alpha: float | None = None,
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Adapter:
    """Put the adapter at `path` into `model`, which may be adapted already or not. Returns the adapter that was read.

    format: its name; by default the path tells. alpha: needed for loralib's files, which do not hold it. dtype: that of
    the factors, see `insert`. force: leave out what does not fit the model instead of refusing it. Nothing is fetched
    from a network. Raises FileNotFoundError, or LoraError for what cannot be read and for what does not fit.
    """
    adapter = read_for(model, path, format=format, alpha=alpha)
    try:
        insert(model, adapter, dtype=dtype, force=force)
    except ValueError as error:
        raise LoraError(f"{path}: {error}") from None
    return adapter


def read_for(model: nn.Module, path: str | Path, *, format: str | None = None, alpha: float | None = None) -> Adapter:
    """The adapter at `path`, under the names that `model` has."""
    host = Host(model)
    return translated(format_of(path, format).read(Path(path), host, alpha), host)
