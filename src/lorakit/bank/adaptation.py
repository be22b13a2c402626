"""`Adaptation`: all that one adapter is on a model, taken off the model and put back on.

`attach` and `load` change modules in place: their class, their factors, what is trained whole. Each changed module has
a note of what it was (`core/undo.py`), by which `detach` gives back the base model. Taking off does the same, but keeps
what it removes. Putting on gives the very same objects back, so an optimizer made for the factors stays right.

Which of the base's parameters are trained changes with it: while it is on, those that were trained with it last; off,
those that were trained before it was put on.

While it is off, `layers` shows the adapted layers as they would be on the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.adapted import AdaptedLayer
from ..core.attach import adapted_layers
from ..core.errors import LoraError
from ..core.hooked import follow_class
from ..core.mergeable import Mergeable
from ..core.names import named_modules
from ..core.parameters import AdaptedParameter
from ..core.token_rows import TrainedRows, token_tables
from ..core.undo import ADAPTED, NOTE, Undo, note, own_tensor, restore, undo_of

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass
class _Changed:
    """One changed module: what an adapter gave it."""

    name: str
    module: nn.Module
    cls: type[nn.Module]
    attributes: dict[str, Any]
    registered: dict[str, dict[str, Any]]  # registry → its entries named `lora_*`
    own: dict[str, nn.Parameter | None]  # parameters that took the place of tied ones
    undo: Undo


class Adaptation:
    """The adapter that `model` has when this is made. It is taken off."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._changed: list[_Changed] = []
        self._adapted: list[tuple[nn.Module, Any]] = []
        self._flags: list[tuple[nn.Module, str, bool]] = []  # requires_grad of the base's parameters while it is on
        self._shown: dict[str, nn.Module] | None = None
        self._layers: dict[str, AdaptedLayer] | None = None  # of the same
        self.is_on = True
        self.take_off()

    def take_off(self) -> None:
        """Take the adapter off the model, which is the base model afterwards. A merged one is unmerged first."""
        if any(undo.swapped for module in self._model.modules() if (undo := note(module))):
            raise LoraError("the model is inside lorakit.disabled, where it is the base model. Leave that first.")
        noted = [(name, module, undo) for name, module in named_modules(self._model) if (undo := note(module))]
        self.is_on, self._shown, self._layers = False, None, None
        if not noted:
            return  # detached meanwhile: what was taken off before is what there is
        for module in list(self._model.modules()):
            if isinstance(module, Mergeable):
                module.unmerge()
        adapted = [(module, own) for module in self._model.modules() if (own := module.__dict__.get(ADAPTED))]
        self._changed = [_changed(name, module, undo) for name, module, undo in noted]
        self._flags = [(module, local, own.requires_grad) for module, local, own in self._base_parameters()]
        self._adapted = adapted
        for module, _ in self._adapted:
            module.__dict__.pop(ADAPTED, None)
        for changed in self._changed:
            restore(changed.module, keep_trained=False)

    def is_there(self) -> bool:
        """Whether the model has it: it is on, and was not detached meanwhile."""
        return self.is_on and any(NOTE in changed.module.__dict__ for changed in self._changed)

    def put_on(self) -> None:
        """Put it back on the base model. The factors follow the model to another device."""
        before = {(module, local): own.requires_grad for module, local, own in self._base_parameters()}
        for changed in self._changed:
            module = changed.module
            module.__class__ = changed.cls
            module.__dict__.update(changed.attributes)
            for registry, entries in changed.registered.items():
                getattr(module, registry).update(entries)
            module._parameters.update(changed.own)
            module.__dict__[NOTE] = changed.undo
            follow_class(module)
            changed.undo.swap(module)
            for child in changed.registered["_modules"].values():
                child.train(module.training)
            if isinstance(module, Mergeable):
                _follow(module)
        for module, local, flag in self._flags:
            if (module, local) not in before:
                continue  # the model has lost it
            flags = {} if (undo := note(module)) is None else undo.requires_grad
            if local in flags or before[module, local] != flag:
                undo_of(module).requires_grad[local] = before[module, local]
                own_tensor(module, local).requires_grad = flag
        for module, adapted in self._adapted:
            module.__dict__[ADAPTED] = adapted
        self.is_on = True

    def layers(self) -> dict[str, AdaptedLayer]:
        """The adapted layers by module name, with the adapter's own factors, whether it is on or off.

        Off the model they are views of the plain modules: they hold the same tensors, and are no part of the model.
        """
        if self.is_on:
            return adapted_layers(self._model)
        if self._layers is not None:
            return self._layers
        found = self._layers = {}
        for own, module in self._as_on().items():
            prefix = f"{own}." if own else ""
            if isinstance(module, AdaptedLayer) and module.has_update:
                found[own] = module
            for name, child in module._modules.items():
                if isinstance(child, AdaptedParameter):
                    found[child.public_name(prefix + name)] = child
        return found

    def tables(self) -> dict[str, TrainedRows]:
        """The tables with trained rows, by module name, in the same way."""
        if self.is_on:
            return token_tables(self._model)
        return {name: module for name, module in self._as_on().items() if isinstance(module, TrainedRows)}

    def mergeable(self) -> dict[str, Mergeable]:
        """The adapted layers and the tables with trained rows, in the same way."""
        return {**self.layers(), **self.tables()}

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that the adapter trains: its own that are not frozen, and what it trains beside them."""
        own = {id(tensor): tensor for tensor in (*self._factors(), *self.trained().values())}
        flags = {} if self.is_on else self._flags_by_id()
        for key, parameter in own.items():
            if isinstance(parameter, nn.Parameter) and flags.get(key, parameter.requires_grad):
                yield parameter

    def trained(self) -> dict[str, Tensor]:
        """The tensors that belong to the adapter beside its factors (heads, biases), by name. While the adapter is off,
        these hold the base's values.
        """
        found = {}
        for name, module, undo, own in self.noted():
            for local in undo.trained:
                tensor = own.get(local)
                found[f"{name}.{local}".removeprefix(".")] = own_tensor(module, local) if tensor is None else tensor
        return found

    def values(self) -> dict[str, Tensor]:
        """The same tensors with the adapter's own values, also while it is off or the model is inside `disabled`."""
        found: dict[str, Tensor] = {}
        for name, module, undo, _ in self.noted():
            values = undo.values(module) if self.is_on else undo.trained
            found |= {f"{name}.{local}".removeprefix("."): value for local, value in values.items()}
        return found

    def noted(self) -> list[tuple[str, nn.Module, Undo, dict[str, nn.Parameter | None]]]:
        if self.is_on:
            return [(name, module, undo, {}) for name, module in named_modules(self._model) if (undo := note(module))]
        return [(changed.name, changed.module, changed.undo, changed.own) for changed in self._changed]

    def _as_on(self) -> dict[str, nn.Module]:
        """The changed modules, off the model, as they are with the adapter."""
        if self._shown is None:
            self._shown = {changed.name: _shown(changed) for changed in self._changed}
        return self._shown

    def _factors(self) -> Iterator[nn.Parameter]:
        for layer in self.mergeable().values():
            for name, parameter in layer.named_parameters():
                if name.startswith("lora_"):
                    yield parameter

    def _base_parameters(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Every parameter of the model but the factors: its module, and its name there."""
        for module in self._model.modules():
            for local, parameter in module._parameters.items():
                if parameter is not None and not local.startswith("lora_"):
                    yield module, local, parameter

    def _flags_by_id(self) -> dict[int, bool]:
        """requires_grad of the base's parameters, by id, as it is while the adapter is on."""
        own = {changed.module: changed.own for changed in self._changed}
        return {
            id(own.get(module, {}).get(local, module._parameters.get(local))): flag
            for module, local, flag in self._flags
        }


def _changed(name: str, module: nn.Module, undo: Undo) -> _Changed:
    attributes = {}
    if undo.original_class is not None:
        kept = undo.attributes | {NOTE, ADAPTED}
        attributes = {local: value for local, value in module.__dict__.items() if local not in kept}
    return _Changed(
        name=name,
        module=module,
        cls=type(module),
        attributes=attributes,
        registered={
            registry: {local: own for local, own in getattr(module, registry).items() if local.startswith("lora_")}
            for registry in _REGISTRIES
        },
        own={local: module._parameters[local] for local in undo.tied},
        undo=undo,
    )


def _shown(changed: _Changed) -> nn.Module:
    """The module as it is with the adapter, beside the one in the model, which another adapter may have changed."""
    module, undo = changed.module, changed.undo
    plain = module.__dict__ if undo.original_class is None else undo.attributes & module.__dict__.keys()
    shown = changed.cls.__new__(changed.cls)
    shown.__dict__.update({local: module.__dict__[local] for local in plain})
    shown.__dict__.update(changed.attributes)
    for registry, entries in changed.registered.items():
        own = {local: value for local, value in getattr(module, registry).items() if not local.startswith("lora_")}
        shown.__dict__[registry] = {**own, **entries}
    return shown


def _follow(layer: Mergeable) -> None:
    """Move the factors, or the trained rows, to where the weight is."""
    device = layer.like.device
    own = [*layer._parameters.items(), *layer._buffers.items()]
    if any(name.startswith("lora_") and value is not None and value.device != device for name, value in own):
        layer._apply(lambda tensor: tensor.to(device))
