"""The files of a checkpoint that take a model's place: PEFT's two, and the exact tensors to go on from.

adapter_config.json, adapter_model.safetensors    the adapter, for every program
adapter_state.safetensors                         what was trained, as the model names it: to resume
"""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn

from ..core.errors import LoraError
from ..core.state import take_trained_state, trained_state
from ..formats import save
from ..formats.files import read_safetensors, replacing
from .checkpoints import STATE


def write_state(model: nn.Module, folder: Path) -> None:
    """Write the adapter of `model` into a checkpoint, and no weight of a frozen base."""
    save(model, folder)
    with replacing(folder / STATE) as path:
        safetensors.torch.save_file(trained_state(model), path)


def read_state(model: nn.Module, folder: Path) -> None:
    """Take the adapter of a checkpoint into `model`, which is adapted already. The optimizer keeps its parameters.

    Raises LoraError for an adapter of other settings, and for a folder with PEFT's files alone: their factors may have
    other shapes than those that the optimizer's state is for, which ended the process in AdamW.
    """
    path = folder / STATE
    if not path.is_file():
        raise LoraError(
            f"{folder} has no {STATE}, so a run cannot go on from it. To start a new run from an adapter in it, call "
            "lorakit.load(model, folder) instead of attach, and train without resuming."
        )
    take_trained_state(model, read_safetensors(path), str(path))
