"""Adapting a parameter that belongs to no layer: attention's `in_proj_weight`, a stack of experts' matrices.

    self_attn                          the module that owns the parameter; its class gains a property for it
      in_proj_weight                   reading it gives W + s·B A
      lora_in_proj_weight              an `AdaptedParameter`, which holds lora_A and lora_B

Whoever reads the parameter gets the adapted one: the module's own forward, its parent, torch's fast paths. They get a
`Factored`, which multiplies without forming ΔW. W + s·B A is formed in a compiled graph, and for a matrix that is read
while no gradient is recorded, because torch's fast paths take plain tensors only. With DoRA it is always formed.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from . import layouts
from .adapted import AdaptedLayer
from .factored import Factored
from .init import Init
from .layouts import Layout, Stored
from .lora_layer import LoRALayer
from .matrix import precise
from .mergeable import unmerged
from .running import model_is_running

_PREFIX = "lora_"


class AdaptedParameter(AdaptedLayer):
    """The update of one parameter of `owner`.

    matrix    weight (out, in)              A (r, in)      B (out, r)
    experts   weight (experts, out, in)     A (experts, r, in)   B (experts, out, r)

    The experts' weight may be stored as (experts, in, out), see `stored`. A and B have the same shapes then, and A is
    still the factor that is multiplied by x.
    """

    owner: nn.Module
    parameter: str

    @property
    def layout(self) -> Layout:
        return parameter_layout(self.owner, self.weight)

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        nn.Module.__init__(self)
        LoRALayer.__init__(self, 0, 0.0, 0.0, merge_weights=False)
        # Not through nn.Module's __setattr__, which would make the owner a child of its child.
        self.__dict__["owner"] = owner
        self.parameter = parameter
        self.transposed = _is_transposed(owner, self.weight)
        self.train(owner.training)

    @property
    def own_weight(self) -> Tensor:
        weight = self.owner._parameters[self.parameter]
        assert weight is not None
        return weight

    @property  # type: ignore[misc]  # nobody sets it
    def weight(self) -> Tensor:
        return self.own_weight

    def _put_weight(self, weight: Any) -> None:
        self.owner._parameters[self.parameter] = weight

    @property
    def bias(self) -> Any:
        """The parameter that is added to what this one gives: in_proj_bias, bias, gate_up_proj_bias."""
        stem, weight, _ = self.parameter.rpartition("weight")
        return self.owner._parameters.get(f"{stem}bias" if weight else f"{self.parameter}_bias")

    def public_name(self, name: str) -> str:
        """The parameter's name for a user, from this module's: `linear1` for the weight of the layer linear1."""
        owner = name.rpartition(".")[0]
        layers = nn.Linear | nn.Embedding | nn.modules.conv._ConvNd
        of_a_layer = self.parameter == "weight" and isinstance(self.owner, layers)
        return owner if of_a_layer else f"{owner}.{self.parameter}".removeprefix(".")

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return parameter_factor_shapes(self.owner, self.weight, rank)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def draw(self, A: Tensor, B: Tensor, init: Init) -> None:
        if A.dim() == 2:
            super().draw(A, B, init)
        else:
            for expert_A, expert_B in zip(A, B, strict=True):
                super().draw(expert_A, expert_B, init)

    def _factor_matrices(self) -> tuple[Tensor, Tensor]:
        return self.factors()

    def _dense(self) -> Tensor:
        A, B = self.factors()
        return precise(B) @ precise(A)

    def read(self) -> Tensor:
        """The value that a reader of the parameter gets: W + ΔW while the update is active."""
        weight = self.own_weight
        if not self.active:
            return self.guard(weight)
        if model_is_running():
            self.mark(read=True)
        needs_plain = torch.compiler.is_compiling() or (weight.dim() == 2 and not torch.is_grad_enabled())
        if needs_plain or "lora_magnitude" in self._parameters:
            return self.adapted_weight()
        A, B = self.factors()
        left, right = self.scaling * B, A
        return Factored(weight, right.mT, left.mT) if self.transposed else Factored(weight, left, right)

    def _weight_key(self, prefix: str) -> str:
        return prefix.removesuffix(f"{_PREFIX}{self.parameter}.") + self.parameter


class _Owner(nn.Module):
    """The base class put before the own class of a module with adapted parameters: see `owner_class`."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _unmerged_parameters(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        with _unmerged_parameters(self):
            return super()._apply(*args, **kwargs)


def adapt_parameter(owner: nn.Module, parameter: str) -> AdaptedParameter:
    """Put an `AdaptedParameter`, which has no update yet, between `parameter` of `owner` and its readers."""
    layer = AdaptedParameter(owner, parameter)
    owner.add_module(_PREFIX + parameter, layer)
    cls: Any = type(owner).__bases__[1] if isinstance(owner, _Owner) else type(owner)
    owner.__class__ = owner_class(tuple(adapted_parameters(owner)), cls)
    return layer


def adapted_parameters(module: nn.Module) -> dict[str, AdaptedParameter]:
    """The module's own parameters that are adapted, by name."""
    return {child.parameter: child for child in module._modules.values() if isinstance(child, AdaptedParameter)}


def parameter_layout(owner: nn.Module, weight: Tensor) -> Layout:
    """The layout of an update of this parameter."""
    return layouts.Stack(stored(owner)) if weight.dim() == 3 else layouts.Matrix()


def parameter_factor_shapes(owner: nn.Module, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B for a parameter of `owner`."""
    *experts, outputs, inputs = weight.mT.shape if _is_transposed(owner, weight) else weight.shape
    return (*experts, rank, inputs), (*experts, outputs, rank)


def stored(owner: nn.Module) -> Stored:
    """How a module stores its experts' matrices.

    By its own word (`is_transposed`, transformers'). Where it says nothing, the shapes of gate_up_proj and down_proj
    tell: only in one of the two ways does the first give twice of what the second takes, and the other way round.
    """
    said = getattr(owner, "is_transposed", None)
    if said is not None:
        return "is_transposed" if said else "out-in"
    up, down = (owner._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if up is None or down is None or (up.dim(), down.dim()) != (3, 3):
        return "out-in"
    return "in-out" if up.shape[1:] == (down.shape[2], 2 * down.shape[1]) else "out-in"


def _is_transposed(owner: nn.Module, weight: Tensor) -> bool:
    """Whether the weight is a stack that is stored as (experts, in, out)."""
    return weight.dim() == 3 and stored(owner) != "out-in"


@functools.cache
def owner_class(parameters: tuple[str, ...], cls: Any) -> Any:
    """`cls` with a property for each of the parameters. Each such class is made once.

    It cannot be imported by a name, so its objects pickle by its parts.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return _new_owner, (parameters, cls), self.__dict__

    def reader(child: str) -> property:
        return property(lambda self: self._modules[child].read())

    return type(
        cls.__name__,
        (_Owner, cls),
        {
            "__module__": cls.__module__,
            "__reduce_ex__": reduce,
            **{parameter: reader(_PREFIX + parameter) for parameter in parameters},
        },
    )


def _new_owner(parameters: tuple[str, ...], cls: Any) -> Any:
    owner = owner_class(parameters, cls)
    return owner.__new__(owner)


def _unmerged_parameters(owner: nn.Module) -> contextlib.ExitStack:
    stack = contextlib.ExitStack()
    for layer in adapted_parameters(owner).values():
        stack.enter_context(unmerged(layer))
    return stack
