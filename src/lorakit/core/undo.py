"""What was changed on a model, noted on its modules, so that `detach` and errors can take it back completely.

Each changed module has a note (`Undo`), so notes also work for a part of a model, for copies and after pickling. The
adapted model also remembers its adapted modules. If a program puts another module in the place of one, as transformers'
`resize_token_embeddings` does with an lm_head, `replaced` notices it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraError
from .hooked import follow_class
from .mergeable import MERGED, StoredWeight
from .names import unwrapped
from .switchable import Switchable

NOTE, ADAPTED = "_lorakit_undo", "_lorakit_adapted"


@dataclass
class Undo:
    """What `attach` changed on one module."""

    original_class: type[nn.Module] | None = None
    attributes: frozenset[str] = frozenset()  # names in the module's __dict__ before
    requires_grad: dict[str, bool] = field(default_factory=dict)  # of the module's own parameters, before
    trained: dict[str, Tensor] = field(default_factory=dict)  # own tensors trained whole: their values before
    tied: dict[str, nn.Parameter] = field(default_factory=dict)  # own parameters that were tied: the tied ones
    whole: bool = False  # the module was named in also_train
    swapped: int = 0  # open `disabled`: if any, the module holds the values before, and `trained` the trained ones

    def values(self, module: nn.Module) -> dict[str, Tensor]:
        """The trained values of the module's own tensors, also inside `disabled`."""
        return dict(self.trained) if self.swapped else {name: _unmerged(module, name) for name in self.trained}

    def swap(self, module: nn.Module) -> None:
        """Exchange the values of the tensors trained whole with those they had before."""
        for name, other in self.trained.items():
            tensor = own_tensor(module, name)
            self.trained[name] = tensor.detach().clone()
            with torch.no_grad():
                tensor.copy_(other)


def undo_of(module: nn.Module) -> Undo:
    """The module's note. A new one is made if there is none."""
    undo = note(module)
    if undo is None:
        undo = module.__dict__[NOTE] = Undo()
    return undo


def note(module: nn.Module) -> Undo | None:
    undo: Undo | None = module.__dict__.get(NOTE)
    return undo


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give the module another class, and note what it was."""
    undo = undo_of(module)
    if undo.original_class is None:
        undo.original_class = type(module)
        undo.attributes = frozenset(module.__dict__) - {NOTE}
    module.__class__ = cls
    follow_class(module)


def restore(module: nn.Module, keep_trained: bool) -> None:
    """Take back what the module's note says. keep_trained: tensors trained whole keep their trained values."""
    module.__dict__.pop(ADAPTED, None)
    undo = note(module)
    if undo is None:
        return
    if keep_trained == bool(undo.swapped):
        undo.swap(module)
    if not keep_trained:
        module._parameters.update(undo.tied)
    del module.__dict__[NOTE]
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.__dict__.pop(MERGED, None)
    if undo.original_class is not None:
        module.__class__ = undo.original_class
        follow_class(module)
        for registry in (module._parameters, module._buffers, module._modules):
            for name in [name for name in registry if name.startswith("lora_")]:
                del registry[name]
        for name in [name for name in module.__dict__ if name not in undo.attributes]:
            del module.__dict__[name]
    for local, flag in undo.requires_grad.items():
        own_tensor(module, local).requires_grad = flag


def own_tensor(module: nn.Module, name: str) -> Tensor:
    """The module's own parameter or buffer of this name."""
    parameter, buffer = module._parameters.get(name), module._buffers.get(name)
    tensor = buffer if parameter is None else parameter
    assert tensor is not None
    return tensor


def _unmerged(module: nn.Module, name: str) -> Tensor:
    """The module's own tensor of this name, without what `merge` changed in it."""
    if name == "weight" and isinstance(module, StoredWeight):
        return module.base_weight
    return own_tensor(module, name)


def remember(model: nn.Module, layers: Mapping[str, Switchable]) -> None:
    """Note on `model` which modules are adapted, by name."""
    unwrapped(model).__dict__[ADAPTED] = dict(layers)


def is_adapted_root(module: nn.Module) -> bool:
    """Whether `module` itself, and not only a part of it, was given to `attach` or `insert`."""
    return ADAPTED in module.__dict__


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """What now stands in the place of each adapted module that is no longer part of `model`, by name.

    A module that was detached, or removed without a replacement, is not listed.
    """
    present = {id(module) for module in model.modules()}
    found: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        for name, layer in module.__dict__.get(ADAPTED, {}).items():
            if id(layer) in present or not (isinstance(layer, Switchable) and layer.has_update):
                continue
            with contextlib.suppress(AttributeError):
                now = module.get_submodule(name)
                if not isinstance(now, Switchable):
                    found[f"{prefix}.{name}" if prefix else name] = now
    return found


def refuse_replaced(model: nn.Module) -> None:
    """Raise LoraError if another module took the place of an adapted one, whose update would be lost silently."""
    lost = replaced(model)
    if lost:
        shown = ", ".join(f"{name} (now a {type(module).__name__})" for name, module in list(lost.items())[:5])
        raise LoraError(
            f"adapted modules were replaced by others, and their updates are lost: {shown}. Something made new modules "
            "after attach (resize_token_embeddings makes a new lm_head): do that before attach or load, or adapt the "
            f"new ones too: lorakit.attach(model, {list(lost)[:5]})."
        )


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module, written: Iterable[Tensor] = ()) -> Iterator[None]:
    """An error inside leaves `model` as it was: classes, attributes, parameters, `requires_grad`.

    written: tensors whose values are changed inside.
    """
    modules = [(module, type(module), _copied(module)) for module in model.modules()]
    notes = [(undo, _copy_of(undo)) for module in model.modules() if (undo := note(module))]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    values = [(tensor, tensor.detach().clone()) for tensor in written]
    try:
        yield
    except BaseException:
        for module, cls, attributes in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for undo, before in notes:  # the same objects, because an open `disabled` holds them
            undo.__dict__.update(before.__dict__)
        for parameter, flag in flags:
            parameter.requires_grad = flag
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        raise


def _copied(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, with copies of its collections of parameters, buffers and children."""
    attributes = dict(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        attributes[name] = attributes[name].copy()
    return attributes


def _copy_of(undo: Undo) -> Undo:
    return replace(undo, requires_grad=dict(undo.requires_grad), trained=dict(undo.trained), tied=dict(undo.tied))
