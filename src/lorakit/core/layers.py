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

from . import layouts
from .adapted import AdaptedLayer, LoRALayer, joined
from .conv import Geometry, lora_conv
from .embedding import lora_embedding
from .init import Init, init_of
from .layouts import Layout
from .linear import lora_linear
from .matrix import Blocks, block_diagonal, forms

_NONE_ENABLED: Sequence[bool] = (False,)  # loralib's default


# Named, not imported: transformers' linear layer with a transposed weight (GPT-2).
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
            self.draw(self.lora_A, self.lora_B, init_of("kaiming"))

    @classmethod
    def class_for(cls, layout: Layout) -> type[AdaptedLayer] | None:
        return MergedLinear if cls is Linear and isinstance(layout, layouts.Blocks) else super().class_for(layout)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_features), (self.out_features, rank)

    @classmethod
    def shapes_on(cls, module: Any, rank: int, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        outputs, inputs = plain_matrix(module).shape
        if isinstance(layout, layouts.Blocks) and sum(size for size, _ in layout.sizes) == outputs:
            return block_shapes(layout.sizes, inputs)
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
    """(out, in) of a linear layer. Raises ValueError where neither its attributes nor its weight tell."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.out_features, module.in_features
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"the size of {type(module).__name__} is not known: it has neither in_features and out_features nor a "
            "weight (out, in)."
        )
    return weight.shape[0], weight.shape[1]


class MergedLinear(Linear):
    """Several linear layers in one weight (q, k and v), each of them with an update of its own or none.

    enable_lora: a flag for each block of the output; all of them when left out beside splits or several ranks.
    splits: the sizes of the blocks, by default equal. r: the rank, or a rank for each block (0 for none).

    A (Σ rᵢ, in), B (Σ sizeᵢ, max r), sums over the blocks with an update: block i reads its own rᵢ rows of A with the
    first rᵢ columns of its rows of B. The scale is lora_alpha / max r for all of them.

    That is a `Linear` whose B is block-diagonal, (out, Σ rᵢ), with zero rows for the blocks left out; it is computed
    as one, so ΔW is never formed in training.
    """

    blocks: Blocks
    enable_lora: Sequence[bool]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int | Sequence[int] = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = _NONE_ENABLED,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        blocks = blocks_of(out_features, r, enable_lora, splits)
        rank = max(rank for _, rank in blocks)
        self.set_blocks(blocks, None if enable_lora is _NONE_ENABLED and rank else enable_lora)
        super().__init__(
            in_features, out_features, rank, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **kwargs
        )

    @property
    def layout(self) -> Layout:
        return layouts.Blocks(self.blocks)

    def adopted(self, plain: type[nn.Module], layout: Layout) -> None:
        super().adopted(plain, layout)
        assert isinstance(layout, layouts.Blocks)
        self.set_blocks(layout.sizes)

    def set_blocks(self, blocks: Blocks, enable_lora: Sequence[bool] | None = None) -> None:
        """Before there are factors. enable_lora: the flags as they were given."""
        self.blocks = blocks
        self.enable_lora = [rank > 0 for _, rank in blocks] if enable_lora is None else enable_lora

    @property
    def splits(self) -> list[int]:
        """The sizes of the blocks."""
        return [size for size, _ in self.blocks]

    @property
    def lora_ind(self) -> Tensor:
        """Which rows of the weight have an update: bool (out,)."""
        sizes = torch.tensor(self.splits, device=self.weight.device)
        enabled = torch.tensor([rank > 0 for _, rank in self.blocks], device=self.weight.device)
        # The size is given because tensors on "meta" have no values to add up.
        return enabled.repeat_interleave(sizes, output_size=sum(self.splits))

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return block_shapes(self.blocks, self.in_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, block_diagonal(self.lora_B, self.blocks)

    def resized(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        return AdaptedLayer.resized(self, outputs, inputs)  # whose block would the new rows be?

    def zero_pad(self, x: Tensor) -> Tensor:
        """Rows of the enabled blocks put in their places among zeros, (out, …)."""
        enabled = self.lora_ind
        padded = x.new_zeros((len(enabled), *x.shape[1:]))
        padded[enabled] = x
        return padded

    def merge_AB(self) -> Tensor:
        """loralib's name for `delta()`."""
        return self.delta()


def blocks_of(
    out_features: int,
    r: int | Sequence[int],
    enable_lora: Sequence[bool] = _NONE_ENABLED,
    splits: Sequence[int] | None = None,
) -> Blocks:
    """(size, rank) of each block of the output of a `MergedLinear`, rank 0 where there is no update.

    Raises ValueError where the arguments do not agree.
    """
    given = f"out_features={out_features}, r={r}, enable_lora={enable_lora}, splits={splits}"
    if enable_lora is _NONE_ENABLED and (splits is not None or isinstance(r, Sequence)):
        enable_lora = [True] * len(r if isinstance(r, Sequence) else splits or ())
    ranks = list(r) if isinstance(r, Sequence) else [r] * len(enable_lora)
    if splits is None:
        if out_features % len(enable_lora):
            raise ValueError(f"{given}: the output is not a multiple of {len(enable_lora)} equal blocks; give splits.")
        splits = [out_features // len(enable_lora)] * len(enable_lora)
    if not len(splits) == len(ranks) == len(enable_lora) or sum(splits) != out_features or min(*splits, *ranks) < 0:
        raise ValueError(
            f"{given}: expected a rank and a flag for each of the {len(splits)} blocks, and sizes that sum to "
            f"{out_features}."
        )
    return tuple((size, rank if enabled else 0) for size, rank, enabled in zip(splits, ranks, enable_lora, strict=True))


def block_shapes(blocks: Blocks, in_features: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of A and B of a `MergedLinear`."""
    ranks = [rank for _, rank in blocks]
    return (sum(ranks), in_features), (sum(size for size, rank in blocks if rank), max(ranks))


class Embedding(AdaptedLayer, nn.Embedding):
    """y = W[tokens] + s · A[:, tokens]ᵀ Bᵀ     weight (vocabulary, dim); A (r, vocabulary); B (dim, r)

    The padding row keeps no update. max_norm is refused: torch renormalises the stored weight in place during the
    lookup, which has no meaning for a sum of a frozen weight and an update.
    """

    plain_layout = layouts.Table()

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
            self.draw(self.lora_A, self.lora_B, init_of("kaiming"))

    @classmethod
    def refusal_of(cls, module: Any) -> str | None:
        if module.max_norm is not None:
            return f"max_norm={module.max_norm} renormalises the frozen weight in place at each lookup"
        return super().refusal_of(module)

    def draw(self, A: Tensor, B: Tensor, init: Init) -> None:
        assert init.draw is not None
        init.draw(A, B, not self.read_whole)
        if self.padding_idx is not None:
            A.data[:, self.padding_idx] = 0

    def take(self, rank: int, init: Init) -> tuple[Tensor, Tensor]:
        A, B = super().take(rank, init)
        if self.padding_idx is not None:
            A[:, self.padding_idx] = 0  # and no gradient will reach it
        return A, B

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def resized(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        # DoRA's norms run over all rows, those that were cut too.
        if outputs != len(self.lora_B) or "lora_magnitude" in self._parameters:
            return super().resized(outputs, inputs)
        self.num_embeddings = inputs
        return {
            name: (1, inputs) for name in ("lora_A", "lora_A0") if name in self._parameters or name in self._buffers
        }

    def forward(self, tokens: Tensor) -> Tensor:
        base = F.embedding(
            tokens,
            self.own_weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        if not self.active:
            return self.guard(base)
        if self.own_weight.shape != (self.lora_A.shape[1], self.lora_B.shape[0]):
            self.refit()
        self.mark()
        A, B = self.factors()
        y = lora_embedding(
            tokens,
            base,
            A,
            B,
            self.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            dropout=self.acting_dropout,
        )
        gain = self.gain()
        return y if gain is None else y * gain.to(y.dtype)


class ConvLoRA(AdaptedLayer):
    """y = conv(x, W) + b + s · conv(x, ΔW)     weight (out, in/groups, *k), any number of dimensions

    Two layouts of the factors, of different rank, told apart by their dimensions:

    loralib's (its constructors)    A (r·k_last, in·k_last), B (out/groups·∏k[:-1], r·k_last), ΔW = (B A) viewed as
                                    the kernel. The rank of ΔW as a matrix (out, in/groups·∏k) is up to r·∏k.
    factored (`attach`)             A (r, in/groups, *k), B (out, r, 1, …): a convolution to r channels, then 1×1.
                                    With groups, every group shares A.
    """

    plain_layout = layouts.Kernel()

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: Any
    bias: Tensor | None
    _reversed_padding_repeated_twice: list[int]
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
        if not isinstance(self, conv_module):
            # loralib's subclasses inherit ConvLoRA alone and name the convolution here
            self.__class__ = joined(type(self), conv_module)
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
            self.draw(self.lora_A, self.lora_B, init_of("kaiming"))

    @property
    def conv(self) -> nn.Module:
        """loralib keeps the convolution in a submodule of this name; here the layer is the convolution."""
        return self

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ones = (1,) * len(self.kernel_size)
        return (rank, self.in_channels // self.groups, *self.kernel_size), (self.out_channels, rank, *ones)

    @property
    def layout(self) -> Layout:
        return layouts.Kernel(self.groups) if self.is_factored else layouts.LoralibKernel(self.kernel_size[-1])

    @property
    def is_factored(self) -> bool:
        return self.lora_A.dim() > 2

    def as_product(self, weight: Tensor) -> Tensor:
        return self.matrix(weight) if self.is_factored else weight.reshape(len(self.lora_B), -1)

    def _dense(self) -> Tensor:
        update = super()._dense()
        # loralib's factors multiply to another matrix, of as many entries, which is viewed as the kernel.
        return update if self.is_factored else self.matrix(update.view(self.own_weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.guard(self._conv_forward(x, self.own_weight, self.bias))
        self.refit()  # which refuses a weight of another shape
        self.mark()
        gain = self.gain()
        if gain is None:
            return self._adapted_forward(x, self.bias)
        channels = (-1, *(1,) * len(self.kernel_size))
        y = self._adapted_forward(x, None)
        y = y * gain.to(y.dtype).view(channels)
        return y if self.bias is None else y + self.bias.to(y.dtype).view(channels)

    def _adapted_forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """conv(x, W + s·ΔW) + bias"""
        A, B = self.factors()
        dropout = self.acting_dropout
        if self.is_factored and self.groups == 1:
            x, geometry = self._padded(x)
            return lora_conv(x, self.own_weight, bias, A, B, self.scaling, geometry, dropout)
        # These kernels have no thin form: loralib's layout has none, and grouped kernels are thin already.
        update = self.scaling * self.delta()
        if dropout is None and forms(x, self.own_weight, A, B):
            return self._conv_forward(x, self.own_weight + update, bias)
        dropped = x if dropout is None else dropout(x)
        return self._conv_forward(x, self.own_weight, bias) + self._conv_forward(dropped, update.to(x.dtype), None)

    def _padded(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """x padded where that is not the same number of zeros on both sides, and how the kernel moves over it."""
        sides = self._reversed_padding_repeated_twice  # torch's, for F.pad: the last dimension first
        before, after = tuple(sides[-2::-2]), tuple(sides[-1::-2])
        if self.padding_mode != "zeros":
            x = F.pad(x, sides, mode=self.padding_mode)
        elif before != after:
            x = F.pad(x, sides)
        else:
            return x, Geometry(self.stride, before, self.dilation)
        return x, Geometry(self.stride, (0,) * len(before), self.dilation)

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
