"""What every adapted layer has: the settings, the update's parameters, exact merging, a state dict free of the mode.

A layer kind (`layers.py`) supplies

    factor_shapes     the shapes of A and B
    factors           the A and B of the equation
    matrix            the weight seen as the matrix (out, in) that B A is added to, and `from_matrix` back
    forward           through `functional.py`

and `AdaptedLayer` does the rest.

Merging  W ← g ⊙ (W + s·B A)  puts a new Parameter in the place of `weight` and keeps the old one aside; unmerging puts
the old one back. So the base weight is restored bit for bit in every dtype, however often, and a weight that is tied
to another module's (lm_head and embedding) is not changed under that module. The price is the merged layers' weights
twice in memory until `unmerge`, or `detach`, which keeps the merged one alone.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn

from .factored import Factored
from .functional import Dropout, add_product, dense_update, dora_gain, precise, row_norm
from .init import Init, factors_of_weight, random_factors
from .running import model_is_running


def no_dropout(x: Tensor) -> Tensor:
    """The dropout of probability zero: a function of this module, so that layers pickle."""
    return x


@functools.cache
def joined(first: Any, second: Any) -> Any:
    """The class `first` with `second` behind it, made once. It has no name to be found under, so it pickles by its two
    parts.
    """

    def reduce(self: Any, protocol: Any) -> Any:
        return _new_joined, (first, second), self.__dict__

    return type(first.__name__, (first, second), {"__module__": first.__module__, "__reduce_ex__": reduce})


def _new_joined(first: Any, second: Any) -> Any:
    cls = joined(first, second)
    return cls.__new__(cls)


class LoRALayer:
    """loralib's mixin: the settings of one adapted layer. A plain class, usable with any `nn.Module`.

    r: rank, 0 for none. lora_alpha: the numerator of the scale. lora_dropout: probability, on the update's input
    alone. merge_weights: merge in `eval()`, unmerge in `train()`.
    """

    r: int
    lora_alpha: float
    lora_dropout: Dropout
    merged: bool
    merge_weights: bool

    def __init__(self, r: int, lora_alpha: float, lora_dropout: float, merge_weights: bool) -> None:
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = nn.Dropout(p=lora_dropout) if lora_dropout > 0 else no_dropout
        self.merged = False
        self.merge_weights = merge_weights


class AdaptedLayer(LoRALayer, nn.Module):
    """What every layer kind shares: the update's parameters, merging, and the state dict.

    Parameters named `lora_*` are the adapter: `lora_A`, `lora_B`, with DoRA `lora_magnitude` (out,), and with the
    inits "pissa" and "olora" the constant buffers `lora_A0`, `lora_B0`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: Tensor
    lora_B0: Tensor
    scaling: float
    rslora: bool = False
    lora_enabled: bool = True  # False inside `disabled(model)`
    read_as_sum: bool = False  # whether a model that reads `weight` gets W + ΔW: `attach` sets it
    was_called: bool = False  # since `attach`, or since `forget`: the forward pass of the layer,
    was_read: bool = False  # the weight, by a model that computes with it,
    was_recorded: bool = False  # and either of them where gradients are recorded
    _base_weight: Tensor | None = None  # while merged: the weight as it was

    # --- the weight -----------------------------------------------------------------------------------------------

    @property
    def own_weight(self) -> Tensor:
        """The stored weight: W, or what took its place in `merge`."""
        if "weight" in self.__dict__:  # a tensor put there by data parallelism or pruning
            put: Tensor = self.__dict__["weight"]
            return put
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        weight = self._parameters["weight"]
        return weight  # type: ignore[return-value]

    @property
    def weight(self) -> Tensor:
        """The stored weight; for a model that computes with it instead of calling the layer, W + ΔW."""
        if self.read_as_sum and self.active and model_is_running():
            return self.read()
        return self.own_weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value  # no Parameter: nn.Module keeps those

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def read(self) -> Tensor:
        """g ⊙ (W + s·ΔW) for whoever computes with it, in the weight's layout.

        A plain tensor, because kernels and autograd functions of others take no other. Where text is generated, a layer
        that is called as well is read for its dtype alone (T5), so there the sum is not formed before it is used.
        """
        plain = torch.is_grad_enabled() or torch.compiler.is_compiling() or "lora_magnitude" in self._parameters
        plain = plain or not self.was_called or self.own_weight.dim() != 2
        self.mark(read=True)
        if plain:
            return self.adapted_weight()
        A, B = self.factors()
        stored_as_matrix = self.matrix(self.own_weight) is self.own_weight
        left, right = (self.scaling * B, A) if stored_as_matrix else (A.mT, self.scaling * B.mT)
        return Factored(self.own_weight, left, right)

    def mark(self, *, read: bool = False) -> None:
        """Note that the update takes part in what is computed now. `diagnose` asks for it.

        Written and never looked at on the way, so that a compiled graph does not depend on it.
        """
        # Past nn.Module's __setattr__, which takes longer than a small layer's product.
        object.__setattr__(self, "was_read" if read else "was_called", True)
        if torch.is_grad_enabled():
            object.__setattr__(self, "was_recorded", True)

    def forget(self) -> None:
        """Take the marks back."""
        self.was_called = self.was_read = self.was_recorded = False

    # --- what a kind supplies -------------------------------------------------------------------------------------

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """`weight` viewed as (out, in)."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix.view(self.own_weight.shape)

    def as_product(self, weight: Tensor) -> Tensor:
        """`weight` viewed in the shape of B A."""
        return self.matrix(weight)

    def draw(self, A: Tensor, B: Tensor, init: Init) -> None:
        """Fill new factors in place such that ΔW = 0."""
        random_factors(A, B, init)

    def take(self, rank: int, init: Init) -> tuple[Tensor, Tensor]:
        """Factors as matrices that are a part of the weight."""
        return factors_of_weight(self.matrix(self.own_weight), rank, self.scaling, init)

    # --- the update -----------------------------------------------------------------------------------------------

    @property
    def has_update(self) -> bool:
        return self._parameters.get("lora_A") is not None

    @property
    def active(self) -> bool:
        """Whether the forward pass adds the update to what the weight gives."""
        return self.lora_enabled and not self.merged and self.has_update

    @property
    def acting_dropout(self) -> Dropout | None:
        """The dropout of the update's input, or None where it does nothing: in `eval()`, and with probability zero."""
        dropout = self.lora_dropout
        idle = dropout is no_dropout or (isinstance(dropout, nn.Dropout) and not (dropout.training and dropout.p > 0))
        return None if idle else dropout

    def set_scale(self, rank: int, alpha: float, rslora: bool = False) -> None:
        """s = α/r (Hu et al. 2021, section 4.1), or α/√r (rsLoRA, Kalajdzievski 2023)."""
        self.r, self.lora_alpha, self.rslora = rank, alpha, rslora
        self.scaling = alpha / math.sqrt(rank) if rslora else alpha / rank

    def create_update(
        self, rank: int, alpha: float, *, rslora: bool, dora: bool, init: Init, dtype: torch.dtype
    ) -> None:
        """Give the layer its trainable factors, on the weight's device, such that ΔW = 0."""
        self.set_scale(rank, alpha, rslora)
        A_shape, B_shape = self.factor_shapes(rank)
        A = torch.empty(A_shape, dtype=dtype, device=self.own_weight.device)
        B = torch.empty(B_shape, dtype=dtype, device=self.own_weight.device)
        if init in ("pissa", "olora"):
            A0, B0 = self.take(rank, init)
            A, B = A0.view(A_shape).to(dtype), B0.view(B_shape).to(dtype)
            self.register_buffer("lora_A0", A.clone())
            self.register_buffer("lora_B0", B.clone())
        else:
            self.draw(A, B, init)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        if dora:
            norm = torch.linalg.vector_norm(
                self.matrix(self.own_weight), dim=1, dtype=precise(self.own_weight[:0]).dtype
            )
            self.lora_magnitude = nn.Parameter(norm.detach().to(dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """The A (r, in, …) and B (out, r, …) of the equation, differentiable in the layer's parameters.

        With "pissa" and "olora", [A; A₀] and [B, −B₀]: twice the rank, and B A − B₀ A₀ without a dense product.
        """
        if "lora_A0" not in self._buffers:
            return self.lora_A, self.lora_B
        return torch.cat((self.lora_A, self.lora_A0)), torch.cat((self.lora_B, -self.lora_B0), 1)

    def delta(self) -> Tensor:
        """ΔW without its scale, dense, in the weight's own layout and float32 at least."""
        return self.from_matrix(self._dense())

    def gain(self) -> Tensor | None:
        """DoRA's g (out,), or None for plain LoRA."""
        if "lora_magnitude" not in self._parameters:
            return None
        A, B = (factor.detach() for factor in self._factor_matrices())
        return dora_gain(self.lora_magnitude, row_norm(self.matrix(self.own_weight.detach()), A, B, self.scaling))

    def _factor_matrices(self) -> tuple[Tensor, Tensor]:
        """The same as matrices."""
        A, B = self.factors()
        return A.flatten(1), B.flatten(1)

    def _dense(self) -> Tensor:
        return dense_update(*self.factors())

    def adapted_matrix(self) -> Tensor:
        """g ⊙ (W + s·ΔW) as a matrix (out, in), in float32 at least."""
        total = self.matrix(precise(self.own_weight)) + self.scaling * self._dense()
        if "lora_magnitude" in self._parameters:
            # Here the sum is at hand, so its norm is taken of it: not as the sum of squares that `row_norm` adds up,
            # which loses digits where the update cancels the weight.
            total = total * dora_gain(self.lora_magnitude, torch.linalg.vector_norm(total, dim=1))[:, None]
        return total

    def adapted_weight(self) -> Tensor:
        """The same laid out as the weight, rounded once to its dtype."""
        if torch.is_grad_enabled() or "lora_magnitude" in self._parameters:
            return self.from_matrix(self.adapted_matrix()).to(
                self.own_weight.dtype, memory_format=torch.contiguous_format
            )
        merged = torch.empty_like(self.own_weight, memory_format=torch.contiguous_format)
        add_product(self.as_product(merged), self.as_product(self.own_weight), *self._factor_matrices(), self.scaling)
        return merged

    # --- merging --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """W ← g ⊙ (W + s·ΔW). Nothing to do when merged already."""
        if self.merged:
            return
        if self.has_update:
            base = self.own_weight
            merged = nn.Parameter(self.adapted_weight(), requires_grad=base.requires_grad)
            # Past nn.Module's __setattr__: the base weight must not appear among the parameters a second time.
            object.__setattr__(self, "_base_weight", base)
            self._put_weight(merged)
        self.merged = True

    def unmerge(self) -> None:
        """The weight as it was before `merge`, the same object, bit for bit."""
        if self._base_weight is not None:
            if self.has_update:  # a program that deleted lora_A while merged means to keep the merged weight
                if not self.own_weight.requires_grad:  # frozen meanwhile
                    self._base_weight.requires_grad = False
                self._put_weight(self._base_weight)
            object.__delattr__(self, "_base_weight")
        self.merged = False

    def _put_weight(self, weight: Tensor) -> None:
        self.weight = weight

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merge_weights:
            if mode:
                self.unmerge()
            else:
                self.merge()
        return self

    def guard(self, y: Tensor) -> Tensor:
        """`y` from a merged weight: a backward pass through it would leave the adapter without a gradient, in silence.

        So it raises instead (problem 17). Costs nothing where no gradient is recorded.
        """
        wants_gradient = torch.is_grad_enabled() and self.merged and self.has_update and self.lora_A.requires_grad
        if wants_gradient and not torch.compiler.is_compiling():
            guarded: Tensor = _MergedGuard.apply(y, self.lora_A)
            return guarded
        return y

    # --- state: independent of the mode it is taken or loaded in ----------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None and self.has_update:
            base = self._base_weight
            destination[self._weight_key(prefix)] = base if keep_vars else base.detach()

    def _weight_key(self, prefix: str) -> str:
        return f"{prefix}weight"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with unmerged(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # .to(), .half(), .cuda(): move the base weight, then merge anew, so that it is rounded once.
        with unmerged(self):
            return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return f"{base}, r={self.r}, lora_alpha={self.lora_alpha}" if self.has_update else base


class unmerged:
    """Context in which a layer is not merged; afterwards it is again what it was."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer, self.was_merged = layer, layer.merged

    def __enter__(self) -> None:
        self.layer.unmerge()

    def __exit__(self, *error: object) -> None:
        if self.was_merged:
            self.layer.merge()


class _MergedGuard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, A: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "backward through a merged LoRA layer: lora_A and lora_B would get no gradient. "
            "Call model.train() (layers made by constructors) or lorakit.unmerge(model) first, "
            "or run the forward pass under torch.no_grad()."
        )
