"""What `attach` found, kept on the model, so that `diagnose` can tell what has changed since.

Plain data in the model's `__dict__`: copies and pickles have it too, `detach` removes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

_KEY = "_lorakit_record"
_LARGEST = 1 << 16  # elements of a buffer that may be statistics; masks and tables are larger


@dataclass
class Record:
    """The adapted layers and the base model's statistics at the time of `attach`."""

    root: int  # the model's id: in a copy the modules' ids say nothing
    modules: dict[str, int] = field(default_factory=dict)  # adapted name → id of the layer, or of the parameter's owner
    statistics: dict[str, Tensor] = field(default_factory=dict)  # buffer → its value, on the CPU

    @staticmethod
    def of(model: nn.Module) -> Record | None:
        return model.__dict__.get(_KEY)

    @staticmethod
    def note(model: nn.Module, adapted: dict[str, nn.Module]) -> None:
        """Add to the record of `model` what is adapted now, by name."""
        record = Record.of(model)
        if record is None:
            record = Record(id(model))
            model.__dict__[_KEY] = record
        record.modules |= {name: id(module) for name, module in adapted.items()}
        for name, buffer in model.named_buffers():
            if name not in record.statistics and is_statistic(buffer) and _is_stored(model, name):
                record.statistics[name] = buffer.detach().to("cpu", copy=True)

    @staticmethod
    def drop(model: nn.Module) -> None:
        model.__dict__.pop(_KEY, None)

    def gone(self, model: nn.Module) -> dict[str, str]:
        """Names that were adapted and lead to another module now → its class."""
        missing = {}
        for name, identity in self.modules.items():
            found = _find(model, name)
            if found is None:
                missing[name] = "missing"
            elif not _is_adapted(found) and (id(found) != identity or id(model) != self.root):
                missing[name] = type(found).__name__
        return missing


def is_statistic(buffer: Tensor) -> bool:
    """Whether a buffer of this kind may be a running mean, a variance, a count."""
    return not buffer.is_meta and buffer.numel() <= _LARGEST and buffer.dtype != torch.bool


def _is_stored(model: nn.Module, name: str) -> bool:
    """Whether a buffer of the base model is part of its state dict; others are made anew."""
    owner, _, local = name.rpartition(".")
    return not local.startswith("lora_") and local not in model.get_submodule(owner)._non_persistent_buffers_set


def _find(model: nn.Module, name: str) -> nn.Module | None:
    """The module of this name; for a parameter's name, its owner."""
    found: nn.Module = model
    parts = name.split(".")
    for index, part in enumerate(parts):
        inner = found._modules.get(part)
        if inner is None:
            last = index == len(parts) - 1
            return found if last and part in found._parameters else None
        found = inner
    return found


def _is_adapted(module: nn.Module) -> bool:
    return any(name.startswith("lora_") for registry in (module._parameters, module._modules) for name in registry)
