"""A linear layer with an update, and the plain ones that become it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..adapted import AdaptedLayer
from ..errors import LoraError
from ..init import init_of
from ..layouts import Blocks, Layout
from ..linear import lora_linear
from ..lora_layer import LoRALayer

# transformers' linear layer with a transposed weight (GPT-2), by name, because it is not imported.
TRANSFORMERS_CONV1D = "transformers.pytorch_utils.Conv1D"


def is_transposed(cls: type) -> bool:
    """Whether `cls` is transformers' Conv1D, a linear layer that stores its weight as (in, out)."""
    return f"{cls.__module__}.{cls.__qualname__}" == TRANSFORMERS_CONV1D


class Linear(AdaptedLayer, nn.Linear):
    """y = x Wᵀ + b + s · x Aᵀ Bᵀ     weight (out, in), or (in, out) with fan_in_fan_out; A (r, in); B (out, r)

    fan_in_fan_out: the weight is stored transposed, as GPT-2's Conv1D does.
    """

    fan_in_fan_out: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        self.fan_in_fan_out = fan_in_fan_out
        self.construct(r, self.factor_shapes)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.has_update:
            self.draw(self.lora_A, self.lora_B, init_of("kaiming"))

    @classmethod
    def class_for(cls, layout: Layout) -> type[AdaptedLayer] | None:
        if cls is Linear and isinstance(layout, Blocks):
            from .blocks import MergedLinear  # a subclass of this class

            return MergedLinear
        return super().class_for(layout)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    @classmethod
    def shapes_on(cls, module: Any, rank: int, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        outputs, inputs = plain_matrix(module).shape
        if isinstance(layout, Blocks) and sum(size for size, _ in layout.sizes) == outputs:
            return layout.shapes(inputs)
        return (rank, inputs), (outputs, rank)

    def adopted(self, plain: type[nn.Module], layout: Layout) -> None:
        self.fan_in_fan_out = is_transposed(plain)
        if self.fan_in_fan_out:
            self.in_features, self.out_features = self.own_weight.shape
        elif not hasattr(self, "in_features"):
            self.out_features, self.in_features = linear_size(self)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.fan_in_fan_out else matrix

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix(self.own_weight)
        if not self.active:
            return self.guard(F.linear(x, weight, self.bias))
        self.mark()
        A, B = self.factors()
        if weight.shape != (B.shape[0], A.shape[1]):
            self.refit()
            A, B = self.factors()
        return lora_linear(x, weight, self.bias, A, B, self.scaling, self.acting_dropout, self.gain())

    def resized(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        if inputs != self.lora_A.shape[1]:
            return super().resized(outputs, inputs)
        self.out_features = outputs
        names = ("lora_B", "lora_B0", "lora_magnitude")
        return {name: (0, outputs) for name in names if name in self._parameters or name in self._buffers}


def plain_matrix(module: Any) -> Tensor:
    """The weight (out, in) of a linear layer that is not adapted."""
    weight: Tensor = module.weight
    return weight.T if is_transposed(type(module)) else weight


def linear_size(module: Any) -> tuple[int, int]:
    """(out, in) of a linear layer. Raises LoraError where neither its attributes nor its weight tell."""
    for outputs, inputs in (("out_features", "in_features"), ("outfeatures", "infeatures")):  # AutoGPTQ's names
        if hasattr(module, outputs) and hasattr(module, inputs):
            return getattr(module, outputs), getattr(module, inputs)
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise LoraError(
            f"the size of {type(module).__name__} is not known: it has neither in_features and out_features nor a "
            "weight (out, in)."
        )
    return weight.shape[0], weight.shape[1]
