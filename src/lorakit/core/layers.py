"""The adapted layers: a frozen weight, two thin factors beside it, and merging that can be taken back exactly.

    Linear, MergedLinear, Embedding, Conv1d, Conv2d, Conv3d       loralib's names and constructor arguments

Each is a subclass of torch's own layer, so an existing `nn.Linear` becomes one by changing its class (`attach.py`) and
everything that worked on the module before works after. A kind supplies

    factor_shapes     the shapes of A and B
    factors           the A and B of the equation
    matrix            the weight seen as the matrix (out, in) that B A is added to, and `from_matrix` back
    forward           through `functional.py`

and `AdaptedLayer` does the rest: creating the update, merging, and keeping the state dict free of the mode.

Merging  W ← g ⊙ (W + s·B A)  puts a new Parameter in the place of `weight` and keeps the old one aside; unmerging puts
the old one back. So the base weight is restored bit for bit in every dtype, however often, and a weight that is tied
to another module's (lm_head and embedding) is not changed under that module. The price is the merged layers' weights
twice in memory until `unmerge`, or `detach`, which keeps the merged one alone.

What is not here: choosing layers (`attach.py`), files (`lorakit.formats`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .functional import Dropout, dense_update, dora_gain, lora_embedding, lora_linear, precise, row_norm
from .init import Init, factors_of_weight, random_factors


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


class AdaptedLayer(LoRALayer, nn.Module):
    """What every layer kind shares: the update's parameters, merging, and the state dict.

    Parameters named `lora_*` are the adapter: `lora_A`, `lora_B`, with DoRA `lora_magnitude` (out,), and with the
    inits "pissa" and "olora" the constant buffers `lora_A0`, `lora_B0`.
    """

    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_A0: Tensor
    lora_B0: Tensor
    scaling: float
    rslora: bool = False
    lora_enabled: bool = True  # False inside `disabled(model)`
    _base_weight: Tensor | None = None  # while merged: the weight as it was

    # --- what a kind supplies -------------------------------------------------------------------------------------

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of lora_A and lora_B."""
        raise NotImplementedError

    def matrix(self, weight: Tensor) -> Tensor:
        """`weight` viewed as (out, in)."""
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix.view(self.weight.shape)

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
        idle = dropout is no_dropout or (type(dropout) is nn.Dropout and not (dropout.training and dropout.p > 0))
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
        A = torch.empty(A_shape, dtype=dtype, device=self.weight.device)
        B = torch.empty(B_shape, dtype=dtype, device=self.weight.device)
        if init in ("pissa", "olora"):
            A0, B0 = factors_of_weight(self.matrix(self.weight), rank, self.scaling, init)
            A, B = A0.view(A_shape).to(dtype), B0.view(B_shape).to(dtype)
            self.register_buffer("lora_A0", A.clone())
            self.register_buffer("lora_B0", B.clone())
        else:
            random_factors(A, B, init, embedding=isinstance(self, nn.Embedding))
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(B)
        if dora:
            norm = torch.linalg.vector_norm(self.matrix(self.weight), dim=1, dtype=precise(self.weight[:0]).dtype)
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
        A, B = (factor.detach().flatten(1) for factor in self.factors())
        return dora_gain(self.lora_magnitude, row_norm(self.matrix(self.weight.detach()), A, B, self.scaling))

    def _dense(self) -> Tensor:
        return dense_update(*self.factors())

    # --- merging --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """W ← g ⊙ (W + s·ΔW), in float32 at least and rounded once. Nothing to do when merged already."""
        if self.merged:
            return
        if self.has_update:
            base = self.weight
            total = self.matrix(precise(base)) + self.scaling * self._dense()
            gain = self.gain()
            if gain is not None:
                total = total * gain[:, None]
            merged = self.from_matrix(total).to(base.dtype, memory_format=torch.contiguous_format)
            # Past nn.Module's __setattr__: the base weight must not appear among the parameters a second time.
            object.__setattr__(self, "_base_weight", base)
            self.weight = nn.Parameter(merged, requires_grad=base.requires_grad)
        self.merged = True

    def unmerge(self) -> None:
        """The weight as it was before `merge`, the same object, bit for bit."""
        if self._base_weight is not None:
            self.weight = self._base_weight
            object.__delattr__(self, "_base_weight")
        self.merged = False

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
        if self._base_weight is not None:
            base = self._base_weight
            destination[prefix + "weight"] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with _unmerged(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # .to(), .half(), .cuda(): move the base weight, then merge anew, so that it is rounded once.
        with _unmerged(self):
            return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return f"{base}, r={self.r}, lora_alpha={self.lora_alpha}" if self.has_update else base


class _unmerged:
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
        self._construct(r)
        if fan_in_fan_out:
            self.weight.data = self.weight.data.T.contiguous()

    def _construct(self, r: int) -> None:
        if r > 0:
            A_shape, B_shape = self.factor_shapes(r)
            self.lora_A = nn.Parameter(self.weight.new_zeros(A_shape))
            self.lora_B = nn.Parameter(self.weight.new_zeros(B_shape))
            self.set_scale(r, self.lora_alpha)
            self.weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.has_update:
            random_factors(self.lora_A, self.lora_B, "kaiming")

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.fan_in_fan_out else matrix

    def forward(self, x: Tensor) -> Tensor:
        weight = self.matrix(self.weight)
        if not self.active:
            return self.guard(F.linear(x, weight, self.bias))
        A, B = self.factors()
        return lora_linear(x, weight, self.bias, A, B, self.scaling, self.acting_dropout, self.gain())


class MergedLinear(Linear):
    """Several linear layers in one weight (q, k and v), each of them with an update of its own or none.

    enable_lora: a flag for each of the equal blocks of the output. With n flags set,
    A (r·n, in), B (out/blocks·n, r): block i of B reads rows i·r … (i+1)·r of A.

    That is a `Linear` whose B is block-diagonal, (out, r·n), with zero rows for the blocks left out; it is computed
    as one, so ΔW is never formed in training.
    """

    lora_ind: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = (False,),
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        if out_features % len(enable_lora):
            raise ValueError(
                f"MergedLinear: out_features={out_features} is not a multiple of the {len(enable_lora)} blocks "
                f"of enable_lora={list(enable_lora)}."
            )
        self.enable_lora = list(enable_lora)
        super().__init__(
            in_features, out_features, r, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **kwargs
        )

    def _construct(self, r: int) -> None:
        super()._construct(r if any(self.enable_lora) else 0)
        enabled = torch.tensor(self.enable_lora, device=self.weight.device)
        # A buffer, to follow .to(); not persistent, to keep the state dict's keys loralib's.
        self.register_buffer("lora_ind", enabled.repeat_interleave(self._block), persistent=False)

    @property
    def _block(self) -> int:
        return self.out_features // len(self.enable_lora)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        enabled = sum(self.enable_lora)
        return (rank * enabled, self.in_features), (self._block * enabled, rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, self.zero_pad(torch.block_diag(*self.lora_B.split(self._block)))

    def zero_pad(self, x: Tensor) -> Tensor:
        """Rows of the enabled blocks (block·n, …) put in their places among zeros (out, …)."""
        padded = x.new_zeros((len(self.lora_ind), *x.shape[1:]))
        padded[self.lora_ind] = x
        return padded

    def merge_AB(self) -> Tensor:
        """loralib's name for `delta()`."""
        return self.delta()


class Embedding(AdaptedLayer, nn.Embedding):
    """y = W[tokens] + s · A[:, tokens]ᵀ Bᵀ     weight (vocabulary, dim); A (r, vocabulary); B (dim, r)

    The padding row keeps no update. max_norm is refused: torch renormalises the stored weight in place during the
    lookup, which has no meaning for a sum of a frozen weight and an update.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r > 0:
            if self.max_norm is not None:
                raise ValueError(
                    f"Embedding: max_norm={self.max_norm} cannot be combined with a LoRA update (r={r}): torch "
                    "renormalises the frozen weight in place at each lookup. Leave max_norm out, or set r=0."
                )
            self.lora_A = nn.Parameter(self.weight.new_zeros((r, num_embeddings)))
            self.lora_B = nn.Parameter(self.weight.new_zeros((embedding_dim, r)))
            self.set_scale(r, lora_alpha)
            self.weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.has_update:
            random_factors(self.lora_A, self.lora_B, "kaiming", embedding=True)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def forward(self, tokens: Tensor) -> Tensor:
        base = nn.Embedding.forward(self, tokens)
        if not self.active:
            return self.guard(base)
        A, B = self.factors()
        y = lora_embedding(
            tokens,
            base,
            A,
            B,
            self.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )
        gain = self.gain()
        return y if gain is None else y * gain.to(y.dtype)


class ConvLoRA(AdaptedLayer):
    """y = conv(x, W) + b + s · conv(x, ΔW)     weight (out, in/groups, *k), any number of dimensions

    Two layouts of the factors, of different rank, told apart by their dimensions:

    loralib's (its constructors)    A (r·k_last, in·k_last), B (out/groups·∏k[:-1], r·k_last), ΔW = (B A) viewed as
                                    the kernel. The rank of ΔW as a matrix (out, in/groups·∏k) is up to r·k.
    factored (`attach`)             A (r, in/groups, *k), B (out, r, 1, …): a convolution to r channels, then 1×1.
                                    With groups, every group shares A.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    bias: Tensor | None
    _conv_forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]  # torch's: padding, stride, dilation, groups

    def __init__(
        self,
        conv_module: type[nn.Module],
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        conv_module.__init__(self, in_channels, out_channels, kernel_size, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, lora_dropout, merge_weights)
        if r > 0:
            *others, last = self.kernel_size
            self.lora_A = nn.Parameter(self.weight.new_zeros((r * last, in_channels * last)))
            rows = out_channels // self.groups * math.prod(others)
            self.lora_B = nn.Parameter(self.weight.new_zeros((rows, r * last)))
            self.set_scale(r, lora_alpha)
            self.weight.requires_grad = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # of the convolution class beside this one
        if self.has_update:
            random_factors(self.lora_A, self.lora_B, "kaiming")

    @property
    def conv(self) -> nn.Module:
        """loralib keeps the convolution in a submodule of this name; here the layer is the convolution."""
        return self

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(self.kernel_size)
        return (rank, self.in_channels // self.groups, *self.kernel_size), (self.out_channels, rank, *ones)

    @property
    def is_factored(self) -> bool:
        return self.lora_A.dim() > 2

    def _dense(self) -> Tensor:
        update = super()._dense()
        # loralib's factors multiply to another matrix, of as many entries, which is viewed as the kernel.
        return update if self.is_factored else self.matrix(update.view(self.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.guard(self._conv_forward(x, self.weight, self.bias))
        gain = self.gain()
        if gain is None:
            return self._conv_forward(x, self.weight, self.bias) + self._update_forward(x)
        channels = (-1, *(1,) * len(self.kernel_size))
        y = self._conv_forward(x, self.weight, None) + self._update_forward(x)
        y = y * gain.to(y.dtype).view(channels)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(channels)

    def _update_forward(self, x: Tensor) -> Tensor:
        x = self.lora_dropout(x)
        if self.is_factored and self.groups == 1:
            A, B = self.factors()
            down = self._conv_forward(x, A.to(x.dtype), None) * self.scaling
            pointwise = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
            return pointwise(down, B.to(x.dtype))
        # Grouped kernels are thin already: one dense kernel costs less than a product for each group.
        return self._conv_forward(x, (self.scaling * self.delta()).to(x.dtype), None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # loralib's files call the weight conv.weight (0.1.2) or hold it under both names (its repository's head).
        for name in ("weight", "bias"):
            if f"{prefix}conv.{name}" in state_dict:
                value = state_dict.pop(f"{prefix}conv.{name}")
                state_dict.setdefault(f"{prefix}{name}", value)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Conv1d(ConvLoRA, nn.Conv1d):
    """`nn.Conv1d` with an update: Conv1d(in_channels, out_channels, kernel_size, r=0, lora_alpha=1, …)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv1d, *args, **kwargs)


class Conv2d(ConvLoRA, nn.Conv2d):
    """`nn.Conv2d` with an update: Conv2d(in_channels, out_channels, kernel_size, r=0, lora_alpha=1, …)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)


class Conv3d(ConvLoRA, nn.Conv3d):
    """`nn.Conv3d` with an update: Conv3d(in_channels, out_channels, kernel_size, r=0, lora_alpha=1, …)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(nn.Conv3d, *args, **kwargs)
