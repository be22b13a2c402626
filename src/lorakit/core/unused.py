"""Which adapted layers took no part in training, and which of them are refused for it.

An adapter that does nothing still trains, saves and loads without an error. So each adapted layer notes whether a
forward pass called it, or computed with its weight (`AdaptedLayer.mark`). Once gradients were recorded, a layer that
was not used is one of two things:

silent   other adapted layers of the same module were used and this one was not: the model uses its weight in another
         way, or does not need it. `save`, `merge` and the first step of `lorakit train` refuse that.
idle     nothing around it was used (a vision tower in a batch of text), or another entry of the same list was (an
         expert, a layer that was dropped). The update is unchanged, so this is no error; if nothing around it was used,
         `save` warns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import nn

from .adapted import AdaptedLayer
from .errors import LoraError

_SHOWN = 20  # names of one kind


class Noted(Protocol):
    """A layer that notes whether it was used."""

    @property
    def was_called(self) -> bool: ...
    @property
    def was_read(self) -> bool: ...
    @property
    def was_reached(self) -> bool: ...
    @property
    def was_recorded(self) -> bool: ...
    @property
    def has_gradient(self) -> bool: ...


def refuse_silent(model: nn.Module, layers: Mapping[str, Noted], way_on: str) -> None:
    """Raise LoraError where an adapted layer does nothing. way_on: what to do, as a sentence."""
    silent, _ = unused(model, layers)
    problems = [f"{name}: no forward pass called it or computed with its weight" for name in silent]
    if not problems:
        return
    used = sum(map(is_used, layers.values()))
    raise LoraError(
        "\n".join(
            (
                f"{len(problems)} adapted layers of {type(model).__name__} do nothing, while {used} others were used:",
                *listed(problems),
                f"{way_on} lorakit.diagnose(model) shows more.",
            )
        )
    )


def idle_note(model: nn.Module, layers: dict[str, AdaptedLayer]) -> str:
    """A note on parts of the model that no forward pass reached; empty if there are none.

    If one entry of a list was used, its other entries are left out: a mixture has idle experts in every step.
    """
    _, idle = unused(model, layers)
    kin = {_entry(model, name) for name, layer in layers.items() if is_used(layer)}
    names = [name for name in idle if _entry(model, name) not in kin]
    if not names:
        return ""
    return "\n".join(
        (f"{len(names)} adapted layers lie in parts of {type(model).__name__} that were not used:", *listed(names))
    )


def first_step_notes(model: nn.Module, layers: dict[str, AdaptedLayer]) -> list[str]:
    """What to say once the gradients of the first step are there: which parts are idle, and where dropout never acts.

    Raises LoraError if a layer does nothing, before hours pass.
    """
    refuse_silent(model, layers, "Name other targets: nothing was trained yet.")
    notes = []
    if note := idle_note(model, layers):
        notes.append(f"note: in the first step {note}")
    if names := without_dropout(layers):
        notes.append("\n".join(("note: the model reads these weights, so dropout never acts there:", *listed(names))))
    return notes


def without_dropout(layers: dict[str, AdaptedLayer]) -> tuple[str, ...]:
    """Layers with dropout that are never called and whose weight is read: there is no input to drop."""
    return tuple(
        name
        for name, layer in layers.items()
        if layer.was_read and not layer.was_called and isinstance(layer.lora_dropout, nn.Dropout)
    )


def listed(names: Iterable[str]) -> list[str]:
    """One line for each name, for the first names only."""
    names = list(names)
    more = [f"  … and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return [*(f"  {name}" for name in names[:_SHOWN]), *more]


def is_used(layer: Noted) -> bool:
    """Whether the update took part: the layer noted it, or (a compiled graph leaves no note) training reached it."""
    return layer.was_called or layer.was_read or layer.was_reached


def unused(model: nn.Module, layers: Mapping[str, Noted]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The silent and the idle layers. None before a gradient is recorded: a model may be used and saved again."""
    if not any(layer.was_recorded or layer.has_gradient for layer in layers.values()):
        return (), ()
    used = [name for name, layer in layers.items() if is_used(layer)]
    kin = {_entry(model, name) for name in used}
    silent: list[str] = []
    idle: list[str] = []
    for name, layer in layers.items():
        if is_used(layer):
            continue
        parent = name.rpartition(".")[0]
        beside = any(other.startswith(f"{parent}." if parent else "") for other in used)
        (silent if beside and _entry(model, name) not in kin else idle).append(name)
    return tuple(silent), tuple(idle)


def _entry(model: nn.Module, name: str) -> str:
    """The name with a star for the place in each list of modules: the same for all entries of a list."""
    module: nn.Module | None = model
    parts = []
    for part in name.split("."):
        if isinstance(module, nn.ModuleList):
            parts.append("*")
        elif isinstance(module, nn.ModuleDict):
            parts.append(re.sub(r"\d+", "*", part))
        else:
            parts.append(part)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)
