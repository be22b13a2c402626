"""The kinds of adapted layers: a frozen weight and two thin factors beside it.

    Linear, MergedLinear, Embedding, Conv1d, Conv2d, Conv3d       loralib's names and constructor arguments

Each is a subclass of torch's own layer, so an existing `nn.Linear` becomes one by changing its class (`attach.py`) and
everything that worked on the module before works after. What they share, merging above all, is in `adapted.py`.

What is not here: choosing layers (`attach.py`), files (`lorakit.formats`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapted import AdaptedLayer, LoRALayer
from .functional import lora_embedding, lora_linear
from .init import random_factors


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
