"""What `attach` found, kept on the model: `diagnose` tells by it what has changed since, `detach` takes it back.

Plain data in the model's `__dict__`: copies and pickles have it too, `detach` removes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .names import unwrapped

_KEY = "_lorakit_record"
_LARGEST = 1 << 16  # elements of a buffer that may be statistics; masks and tables are larger


@dataclass
class Record:
    """The base model's statistics at the time of `attach`."""

    statistics: dict[str, Tensor] = field(default_factory=dict)  # buffer → its value, on the CPU
    is_quantized: bool | None = None  # transformers' note on the model, taken away while the model is adapted

    @staticmethod
    def of(model: nn.Module) -> Record | None:
        return unwrapped(model).__dict__.get(_KEY)

    @staticmethod
    def note(model: nn.Module) -> None:
        """Add to the record of `model` the statistics that are not in it yet."""
        model = unwrapped(model)
        record = Record.of(model)
        if record is None:
            record = model.__dict__[_KEY] = Record()
        # transformers' Trainer refuses a model with this note, because nothing in it can be trained. Now something can.
        record.is_quantized = model.__dict__.pop("is_quantized", record.is_quantized)
        for name, buffer in model.named_buffers():
            if name not in record.statistics and is_statistic(buffer) and _is_stored(model, name):
                record.statistics[name] = buffer.detach().to("cpu", copy=True)

    @staticmethod
    def drop(model: nn.Module) -> None:
        model = unwrapped(model)
        record = model.__dict__.pop(_KEY, None)
        if record is not None and record.is_quantized is not None:
            model.__dict__["is_quantized"] = record.is_quantized


def is_statistic(buffer: Tensor) -> bool:
    """Whether the buffer may be a running mean, a variance or a count."""
    if is_lazy(buffer):  # it has no values yet
        return False
    return not buffer.is_meta and buffer.numel() <= _LARGEST and buffer.dtype != torch.bool


def _is_stored(model: nn.Module, name: str) -> bool:
    """Whether this is a buffer of the base model that its state dict holds. Models compute the other buffers again."""
    owner, _, local = name.rpartition(".")
    return not local.startswith("lora_") and local not in model.get_submodule(owner)._non_persistent_buffers_set
