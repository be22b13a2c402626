"""`diagnose`: which parts of an adapter do nothing, and what its file will not hold.

The marks that this reads are set by the layers (`AdaptedLayer.mark`), and judged in `unused.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .attach import adapted_layers, trained_whole
from .errors import LoraError
from .mergeable import Mergeable
from .names import unwrapped
from .record import Record, is_statistic
from .undo import replaced
from .unused import is_used, listed, unused, without_dropout


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found, by the names of layers, parameters and buffers. Print it."""

    adapted: int  # layers
    used: int  # those that a forward pass called or computed with
    silent: tuple[str, ...] = ()  # not used, though other adapted layers of the same module were
    idle: tuple[str, ...] = ()  # not used, and nothing around them was, or another entry of their list was
    without_gradient: tuple[str, ...] = ()  # factors that a backward pass left out
    without_dropout: tuple[str, ...] = ()  # layers whose weight is read: their dropout never acts
    gone: dict[str, str] = field(default_factory=dict)  # adapted once → the class that took the layer's place
    moved: tuple[str, ...] = ()  # the base model's statistics (BatchNorm's) that changed since `attach`
    not_saved: tuple[str, ...] = ()  # trained parameters that are not part of the adapter

    def __bool__(self) -> bool:
        """Whether anything needs attention. Idle layers and dropout that never acts do not count."""
        return bool(self.silent or self.without_gradient or self.gone or self.moved or self.not_saved)

    def __str__(self) -> str:
        sections = (
            ("never used, while other layers of the same module were: the update does nothing", self.silent),
            ("idle: no forward pass came here", self.idle),
            ("no gradient after a backward pass", self.without_gradient),
            ("dropout never acts: the model reads the weight", self.without_dropout),
            ("adapted once, and gone", [f"{name}: now {kind}" for name, kind in self.gone.items()]),
            ("statistics that moved: no adapter file holds them", self.moved),
            ("trained, and not in the adapter's file", self.not_saved),
        )
        lines = [f"{self.adapted} adapted layers, {self.used} of them used since attach or the last reset"]
        for title, names in sections:
            if names:
                lines.append(f"{title}:")
                lines += listed(names)
        return "\n".join(lines)


def diagnose(model: nn.Module, *, reset: bool = False) -> Diagnosis:
    """Which adapted layers do nothing, and what a saved adapter would lack. Print what it returns.

    Call it after a forward and a backward pass, before the gradients are cleared. reset: afterwards forget which layers
    were used, so that the next call tells of the next passes only. Raises LoraError if nothing is adapted.

        loss.backward()
        print(lorakit.diagnose(model))
    """
    layers = adapted_layers(model)
    record = Record.of(model)
    gone = {name: type(module).__name__ for name, module in replaced(model).items()}
    if not layers and not gone:
        raise LoraError(f"{type(model).__name__} has no adapted layer: call lorakit.attach or lorakit.load first.")
    silent, idle = unused(model, layers)
    found = Diagnosis(
        adapted=len(layers),
        used=sum(map(is_used, layers.values())),
        silent=silent,
        idle=idle,
        without_gradient=_without_gradient(model),
        without_dropout=without_dropout(layers),
        gone=gone,
        moved=_moved(model, record.statistics) if record else (),
        not_saved=_not_saved(model),
    )
    if reset:
        for layer in layers.values():
            layer.forget()
    return found


def _without_gradient(model: nn.Module) -> tuple[str, ...]:
    """Factors without a gradient, if others have one. Factors that were frozen after `attach` are among them."""
    factors = {
        name: parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2].startswith("lora_")
    }
    missing = tuple(name for name, parameter in factors.items() if parameter.grad is None)
    return missing if len(missing) < len(factors) else ()


def _moved(model: nn.Module, before: dict[str, Tensor]) -> tuple[str, ...]:
    now = dict(unwrapped(model).named_buffers())
    return tuple(
        name
        for name, value in before.items()
        if name in now and is_statistic(now[name]) and not torch.equal(now[name].detach().to("cpu", value.dtype), value)
    )


def _not_saved(model: nn.Module) -> tuple[str, ...]:
    """Trainable parameters that are neither factors nor noted by `attach` as trained whole."""
    saved = {id(parameter) for parameter in trained_whole(model)[0].values()}
    inside = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, Mergeable)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("lora_")
    }
    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in saved | inside
    )
