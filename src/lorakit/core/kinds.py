"""Which adapted class a module gets: the one place that knows the kinds, and where a program adds its own.

    lorakit.adapts(MyLinear, lorakit.Linear)        MyLinear computes x Wᵀ + b from its .weight and .bias
    lorakit.adapts(MyQuantised, lorakit.Beside)     any module whose output is linear in x
    lorakit.adapts(Theirs, MyKind)                  MyKind is a subclass of lorakit.AdaptedLayer (see `lora_layer.py`)

A module of a registered class gets the adapted class. A module of a subclass, or one that stores no weight or a
quantised one, may compute its output differently. It gets the kind that adds the update beside that output, if there is
one.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from .adapted import AdaptedLayer
from .beside import AddsBeside, Beside, BesideConv1d, BesideConv2d, BesideConv3d
from .joined import joined
from .layers import TRANSFORMERS_CONV1D, Conv1d, Conv2d, Conv3d, Embedding, Linear
from .mergeable import StoredWeight
from .quantised import has_weight_of_a_class, is_known

_kinds: dict[type[nn.Module] | str, type[AdaptedLayer]] = {
    nn.Linear: Linear,
    TRANSFORMERS_CONV1D: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
_beside: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: Beside,
    nn.Conv1d: BesideConv1d,
    nn.Conv2d: BesideConv2d,
    nn.Conv3d: BesideConv3d,
}


def adapts(plain: type[nn.Module] | str, kind: type[AdaptedLayer]) -> None:
    """From now on, `attach` and `load` adapt modules of the class `plain` as `kind`.

    plain: the class, or its name "package.module.Class", which avoids importing it. Its subclasses are not included.

    Raises TypeError if `plain` or `kind` is not such a class. A class that is registered again gets the new kind.
    """
    if not isinstance(plain, str) and not (isinstance(plain, type) and issubclass(plain, nn.Module)):
        raise TypeError(f"adapts({plain!r}, …): expected a subclass of torch.nn.Module, or its name.")
    if not (isinstance(kind, type) and issubclass(kind, AdaptedLayer)):
        raise TypeError(f"adapts(…, {kind!r}): expected a subclass of lorakit.AdaptedLayer, such as lorakit.Linear.")
    _kinds[plain] = kind


def layer_class(module: nn.Module) -> type[AdaptedLayer] | None:
    """The kind for a module, or None."""
    cls = type(module)
    kind = _kinds.get(cls) or _kinds.get(f"{cls.__module__}.{cls.__qualname__}")
    stores_weight = "weight" in module._parameters and not has_weight_of_a_class(module)
    if kind is not None and (cls not in _beside or stores_weight):
        return kind
    if isinstance(module, StoredWeight | LazyModuleMixin):
        return None
    beside = next((beside for base, beside in _beside.items() if isinstance(module, base)), None)
    return Beside if beside is None and is_known(module) else beside


def class_of(kind: type[AdaptedLayer], plain: type[nn.Module]) -> type[AdaptedLayer]:
    """The class for a module of class `plain` that becomes one of this kind. It is a subclass of `plain`."""
    beside = issubclass(kind, AddsBeside)
    if issubclass(kind, plain) and not beside:
        return kind
    own: type[AdaptedLayer] = joined(kind, plain, plain.__name__ if beside else "")
    return own
