"""A layer with an update: its weight, the factors and scale beside it, and what each kind of layer defines.

A layer kind (`layers/`) is a subclass of `AdaptedLayer` (`adapted.py`) that says everything about itself; no other code
asks which kind a layer is.

    forward           y = base(x) + s · up(down(drop(x))), by `factors()`, `scaling` and `acting_dropout`; it calls
                      `mark()`, and `guard(y)` where the update is not `active`
    factor_shapes     the shapes of A and B
    plain_layout      how they are laid out (`layouts.py`)
    matrix            the weight seen as the matrix (out, in) that B A is added to, and `from_matrix` back
    refusal_of        why a plain layer cannot become one
    shapes_on         the factors' shapes for a plain layer, by `factor_shapes` unless the plain one lacks its sizes
    adopted           what is left to set after a plain layer got this class

`LayerWithUpdate` and `AdaptedLayer` do the rest. A weight of another name than "weight" needs `own_weight`,
`_put_weight` and `_weight_key` as well. `kinds.adapts` says which modules it is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .adapter import Update
from .dropout import Dropout
from .errors import LoraError
from .factored import Factored
from .init import Init, init_of
from .layouts import Layout, Matrix
from .matrix import add_product, dense_update, dora_gain, precise, row_norm
from .mergeable import Mergeable
from .sharded import gathered


def no_dropout(x: Tensor) -> Tensor:
    """The dropout of probability zero: a function of this module, so that layers pickle."""
    return x


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


class LayerWithUpdate(LoRALayer, Mergeable):
    """The update of one layer as parameters, and its sums and products with the weight.

    Parameters named `lora_*` are the adapter: `lora_A`, `lora_B`, with DoRA `lora_magnitude` (out,), and with the
    inits "pissa" and "olora" the constant buffers `lora_A0`, `lora_B0`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: Tensor
    lora_B0: Tensor
    scaling: float
    rslora: bool = False
    plain_layout: ClassVar[Layout] = Matrix()  # of an update on a plain layer, where nothing else is said
    takes_weight: ClassVar[bool] = True  # whether DoRA and the inits that look at the weight find it
    read_whole: bool = False  # the model computes with the whole weight and looks nothing up in it
    was_called: bool = False  # since `attach`, or since `forget`: the forward pass of the layer,
    was_read: bool = False  # the weight, by a model that computes with it,
    was_recorded: bool = False  # and either of them where gradients are recorded
    _forgotten: tuple[Any, ...] = ()  # the state of the factors at that time

    # --- the weight -----------------------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """g ⊙ (W + s·ΔW) for code that computes with it, in the weight's layout.

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

        Not in a compiled graph, where a note made inside torch's checkpointing would break it: there gradients tell.
        """
        if torch.compiler.is_compiling():
            return
        # Past nn.Module's __setattr__, which takes longer than a small layer's product.
        object.__setattr__(self, "was_read" if read else "was_called", True)
        if torch.is_grad_enabled():
            object.__setattr__(self, "was_recorded", True)

    def forget(self) -> None:
        """Clear the marks."""
        self.was_called = self.was_read = self.was_recorded = False
        self._forgotten = self._factor_state()

    @property
    def was_reached(self) -> bool:
        """Whether a gradient, a step of an optimizer or another write reached the factors since `forget`."""
        return bool(self._forgotten) and self._factor_state() != self._forgotten

    @property
    def has_gradient(self) -> bool:
        """Whether a gradient reached the factors since `forget`, and is still there."""
        return bool(self._forgotten) and any(
            now[1] not in (None, before[1]) for now, before in zip(self._factor_state(), self._forgotten, strict=True)
        )

    def _factor_state(self) -> tuple[Any, ...]:
        factors = (self.lora_A, self.lora_B)
        return tuple((f._version, None if f.grad is None else (id(f.grad), f.grad._version)) for f in factors)

    # --- what a kind supplies -------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """The layout of this layer's factors."""
        return self.plain_layout

    @classmethod
    def class_for(cls, layout: Layout) -> type[Any] | None:
        """The class for a plain layer of this kind that is to hold an update of this layout. None where it cannot."""
        return cls if type(layout) is type(cls.plain_layout) else None

    @classmethod
    def refusal_of(cls, module: nn.Module) -> str | None:
        """Why this plain layer cannot be adapted, or None where it can."""
        return weight_refusal(module._parameters.get("weight"))

    @classmethod
    def shapes_on(cls, module: Any, rank: int, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B on a plain layer, which has the sizes that `factor_shapes` reads."""
        return cls.factor_shapes(module, rank)

    def adopted(self, plain: type[nn.Module], layout: Layout) -> None:
        """Set what the layer needs besides its parameters, once it is no longer of the class `plain`."""

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
        assert init.draw is not None
        init.draw(A, B, False)

    def take(self, rank: int, init: Init) -> tuple[Tensor, Tensor]:
        """Factors as matrices that are a part of the weight."""
        assert init.take is not None
        return init.take(self.matrix(self.own_weight), rank, self.scaling)

    def size(self) -> tuple[int, int]:
        """(out, in), as the update sees the layer."""
        outputs, inputs = self.matrix(self.own_weight).shape[-2:]
        return outputs, inputs

    # --- the update -----------------------------------------------------------------------------------------------

    @property
    def has_update(self) -> bool:
        return self._parameters.get("lora_A") is not None

    @property
    def witness(self) -> nn.Parameter:
        return self.lora_A

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

    def construct(self, rank: int, shapes: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
        """End a kind's constructor: make factors and freeze the weight (not for rank 0), then initialise all of it.

        shapes: gives the shapes of A and B for a rank.
        """
        if rank > 0:
            A_shape, B_shape = shapes(rank)
            self.lora_A = nn.Parameter(self.weight.new_zeros(A_shape))
            self.lora_B = nn.Parameter(self.weight.new_zeros(B_shape))
            self.set_scale(rank, self.lora_alpha)
            self.weight.requires_grad = False
        kind: Any = self  # its method draws the weight as torch's class does, and the factors
        kind.reset_parameters()

    def create_update(
        self, rank: int, alpha: float, *, rslora: bool, dora: bool, init: str, dtype: torch.dtype
    ) -> None:
        """Give the layer its trainable factors, on the weight's device, such that ΔW = 0."""
        self.set_scale(rank, alpha, rslora)
        A_shape, B_shape = self.factor_shapes(rank)
        A = torch.empty(A_shape, dtype=dtype, device=self.like.device)
        B = torch.empty(B_shape, dtype=dtype, device=self.like.device)
        begin = init_of(init)
        if begin.take is not None:
            A0, B0 = self.take(rank, begin)
            A, B = A0.view(A_shape).to(dtype), B0.view(B_shape).to(dtype)
            self.register_buffer("lora_A0", A.clone())
            self.register_buffer("lora_B0", B.clone())
        else:
            self.draw(A, B, begin)
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
        """The factors as matrices A (r, in) and B (out, r)."""
        A, B = self.factors()
        return A.flatten(1), B.flatten(1)

    def _dense(self) -> Tensor:
        return dense_update(*self.factors())

    def base_matrix(self) -> Tensor:
        """The stored weight as a matrix (out, in), in float32 at least."""
        return self.matrix(precise(self.own_weight))

    def adapted_matrix(self) -> Tensor:
        """g ⊙ (W + s·ΔW) as a matrix (out, in), in float32 at least."""
        total = self.base_matrix() + self.scaling * self._dense()
        if "lora_magnitude" in self._parameters:
            # The sum is at hand here, so its norm is computed directly. The sum of squares in `row_norm` loses digits
            # where the update cancels the weight.
            total = total * dora_gain(self.lora_magnitude, torch.linalg.vector_norm(total, dim=1))[:, None]
        return total

    def adapted_weight(self) -> Tensor:
        """g ⊙ (W + s·ΔW) laid out as the weight, rounded once to its dtype."""
        if torch.is_grad_enabled() or "lora_magnitude" in self._parameters:
            return self.from_matrix(self.adapted_matrix()).to(
                self.own_weight.dtype, memory_format=torch.contiguous_format
            )
        merged = torch.empty_like(self.own_weight, memory_format=torch.contiguous_format)
        add_product(self.as_product(merged), self.as_product(self.own_weight), *self._factor_matrices(), self.scaling)
        return merged

    # --- as plain data --------------------------------------------------------------------------------------------

    def to_update(self) -> Update:
        """A copy of the update, on the CPU, in the dtype that it is trained in."""
        self.refit()
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        rank, magnitude = self.r, self._parameters.get("lora_magnitude")
        if "lora_A0" in self._buffers:
            # "pissa" and "olora" count double: [A; A₀], [B, −B₀]. Alpha stays, so B makes up for the smaller scale.
            A, B = self.factors()
            rank, B = 2 * rank, B * (math.sqrt(2) if self.rslora else 2)
        return Update(
            layout=self.layout,
            A=copied(A),
            B=copied(B),
            rank=rank,
            alpha=self.lora_alpha,
            rslora=self.rslora,
            magnitude=None if magnitude is None else copied(magnitude),
            fan_in_fan_out=getattr(self, "fan_in_fan_out", False),
            parameter=getattr(self, "parameter", ""),
        )

    # --- a weight that was resized --------------------------------------------------------------------------------

    def resized(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        """Which dimension of which tensors of the update follows a weight that is now (outputs, inputs): name →
        (dimension, size). Raises LoraError where none does.
        """
        A, B = (tuple(factor.shape) for factor in self._factor_matrices())
        raise LoraError(
            f"the weight of {type(self).__name__} is now ({outputs}, {inputs}) as a matrix, and its update is for "
            f"({B[-2]}, {A[-1]}): it cannot follow. Call lorakit.detach before the shape changes, and attach after."
        )

    def fits(self) -> bool:
        """Whether the update has the weight's shape."""
        A, B = self._factor_matrices()
        return self.as_product(self.own_weight).shape[-2:] == (B.shape[-2], A.shape[-1])

    @torch.no_grad()
    def refit(self) -> None:
        """Let the update follow a weight that got more rows or fewer (a resized vocabulary).

        New rows get zeros beside what is there, so they begin without an update. The parameters stay the same objects,
        and become trainable: transformers' `resize_token_embeddings` freezes the whole module like its weight. Raises
        LoraError if the shape has changed in another way. Does nothing if it fits.
        """
        if self.fits():
            return
        outputs, inputs = self.as_product(self.own_weight).shape[-2:]
        for name, (dim, size) in self.resized(outputs, inputs).items():
            tensor = getattr(self, name)
            added = list(tensor.shape)
            added[dim] = max(size - added[dim], 0)
            tensor.grad = None
            tensor.data = torch.cat((tensor.narrow(dim, 0, min(size, tensor.shape[dim])), tensor.new_zeros(added)), dim)
            if name == "lora_magnitude":
                fresh = self.matrix(precise(self.own_weight))[size - added[0] :]
                tensor[size - added[0] :] = torch.linalg.vector_norm(fresh, dim=1).to(tensor.dtype)
        for name, parameter in self._parameters.items():
            if name.startswith("lora_") and parameter is not None:
                parameter.requires_grad_()


def weight_refusal(weight: Any) -> str | None:
    """Why a stored weight cannot be the W of the equation, or None where it can."""
    if weight is None:
        return "its weight is computed from other parameters (weight_norm, parametrisation)"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is stored as {weight.dtype}; load the model dequantised"
    return None


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU. A tensor without data has nothing to copy; formats refuse it by name."""
    tensor = gathered(tensor.detach())
    return tensor if tensor.is_meta else tensor.to("cpu", copy=True)
