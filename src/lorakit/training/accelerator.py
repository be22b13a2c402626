"""accelerate's `save_state` and `load_state` with the adapter in the place of the model.

accelerate offers two hooks for that: before it writes, one may take models' weights out of the list of what is written,
and before it reads, models out of the list of what is read.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..core.attach import adapted_layers
from ..core.errors import LoraError
from .state_files import read_state, write_state

_WHOLE = ("FSDP", "DEEPSPEED", "MEGATRON_LM")  # they have their own checkpoints


def hook_accelerator(accelerator: Any) -> None:
    """Let `accelerator.save_state` write, of an adapted model, the adapter alone, and `load_state` read that.

    Adds a hook for each. The folder then has the adapter as PEFT writes it, and `adapter_state.safetensors` with the
    exact tensors that were trained, in the place of `model.safetensors`; those of a second adapted model are in its
    subfolder `adapter_1`. Other prepared models, optimizers and all else are accelerate's as before.

    Raises LoraError under FSDP, DeepSpeed and Megatron, which write the whole model.
    """
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind in _WHOLE:
        raise LoraError(
            f"under {kind}, accelerate writes states of the whole model, which its hooks cannot change. Use save_state "
            "as it is, and lorakit.save at the end."
        )
    accelerator.register_save_state_pre_hook(partial(_before_saving, accelerator))
    accelerator.register_load_state_pre_hook(_before_loading)


def _before_saving(accelerator: Any, models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
    places = _places(models, folder)
    weights[:] = [state for state, place in zip(weights, places, strict=True) if place is None]
    if accelerator.is_main_process:
        for model, place in zip(models, places, strict=True):
            if place is not None:
                write_state(model, place)


def _before_loading(models: list[nn.Module], folder: str) -> None:
    places = _places(models, folder)
    for model, place in zip(models, places, strict=True):
        if place is not None:
            read_state(model, place)
    models[:] = [model for model, place in zip(models, places, strict=True) if place is None]


def _places(models: list[nn.Module], folder: str) -> list[Path | None]:
    """The folder of each adapted model's adapter; None for a model that accelerate writes itself."""
    return [
        (Path(folder, f"adapter_{index}") if index else Path(folder)) if adapted_layers(model) else None
        for index, model in enumerate(models)
    ]
