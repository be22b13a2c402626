"""Merging a model's adapter into its weights, switching it off, and making it a permanent part of the model."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import nn

from .attach import adapted_layers, detach, mergeable_layers
from .errors import LoraError
from .mergeable import Mergeable
from .switchable import Switchable
from .undo import note, refuse_replaced
from .unused import refuse_silent

# Threads that enter and leave `disabled` take turns: only the first to enter and the last to leave switch the model.
_switching = threading.RLock()


def merge(model: nn.Module, *, force: bool = False) -> None:
    """Fold the update into each adapted layer's weight: W ← W + s·ΔW, rounded once. `unmerge` restores every bit.

    Raises LoraError if training passed over an adapted layer, or another module took the place of one (see `diagnose`);
    `force` allows both. Also raises it for a layer that does not use its weight as it is.
    """
    for layer in _mergeable(model, force).values():
        layer.merge()


def bake(model: nn.Module, *, force: bool = False) -> None:
    """Make the adapter a permanent part of the model: a plain model with W + s·ΔW, and no second copy of any weight.

    The result is that of `merge` and then `detach`, but only one weight at a time is in memory twice. Raises what
    `merge` raises, before anything is changed. What was trained whole keeps its trained values.
    """
    layers = _mergeable(model, force)
    for layer in layers.values():
        layer.bake()
    detach(model)


def unmerge(model: nn.Module) -> None:
    """Take `merge` back: the weights are the same objects with the same bits as before."""
    for layer in _layers_or_error(model).values():
        layer.unmerge()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` is the base model: no update, and the values that heads and biases had before training.

    It may be nested, also for a part of the model, and used from threads and generators: as long as anyone is inside,
    the model is the base model for everyone. If `merge`, `eval()` or `train()` are called inside, the layers are merged
    or unmerged when the last one leaves.
    """
    with _switching:
        layers = [own for own in model.modules() if isinstance(own, Switchable) and own.has_update]
        notes = [(module, undo) for module in model.modules() if (undo := note(module))]
        for layer in layers:
            layer.disable()
        for module, undo in notes:
            undo.swapped += 1
            if undo.swapped == 1:
                undo.swap(module)
    try:
        yield model
    finally:
        with _switching:
            for module, undo in notes:
                undo.swapped -= 1
                if undo.swapped == 0 and note(module) is undo:  # not detached meanwhile
                    undo.swap(module)
            for layer in layers:
                if isinstance(layer, Switchable) and layer.has_update:
                    layer.enable()


def _mergeable(model: nn.Module, force: bool) -> dict[str, Mergeable]:
    """What can be merged. Raises LoraError if one of them cannot be merged, or should not be without force."""
    layers = _layers_or_error(model)
    if not force:
        refuse_replaced(model)
        refuse_silent(model, adapted_layers(model), "Leave them out of the targets, or merge with force=True.")
    for name, layer in layers.items():
        if reason := layer.merge_refusal():
            raise LoraError(f"{name!r} cannot be merged: {reason}. Leave the model unmerged.")
    return layers


def _layers_or_error(model: nn.Module) -> dict[str, Mergeable]:
    layers = mergeable_layers(model)
    if not layers:
        raise LoraError(f"{type(model).__name__} has no adapted layer: call lorakit.attach or lorakit.load first.")
    return layers
