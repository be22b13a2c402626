"""Convolutions with an update, of any number of dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import layouts
from ..adapted import AdaptedLayer
from ..conv import Geometry, lora_conv
from ..init import init_of
from ..joined import joined
from ..layouts import Layout
from ..lora_layer import LoRALayer
from ..matrix import forms


class ConvLoRA(AdaptedLayer):
    """y = conv(x, W) + b + s · conv(x, ΔW)     weight (out, in/groups, *k), any number of dimensions

    The factors have one of two layouts, which differ in rank. Their number of dimensions tells which:

    loralib's (its constructors)    A (r·k_last, in·k_last), B (out/groups·∏k[:-1], r·k_last), ΔW = (B A) viewed as
                                    the kernel. The rank of ΔW as a matrix (out, in/groups·∏k) is up to r·∏k.
    factored (`attach`)             A (r, in/groups, *k), B (out, r, 1, …): a convolution to r channels, then 1×1.
                                    All groups share A.
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
        self.construct(r, self._loralib_shapes)

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # that of the convolution class behind this one
        if self.has_update:
            self.draw(self.lora_A, self.lora_B, init_of("kaiming"))

    def _loralib_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *others, last = self.kernel_size
        rows = self.out_channels // self.groups * math.prod(others)
        return (rank * last, self.in_channels * last), (rows, rank * last)

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
        # The product of loralib's factors is another matrix with as many entries, which is viewed as the kernel.
        return update if self.is_factored else self.matrix(update.view(self.own_weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return self.guard(self._conv_forward(x, self.own_weight, self.bias))
        self.refit()  # raises for a weight of another shape
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
        # Here ΔW is formed: loralib's layout has no thin form, and grouped kernels are thin already.
        update = self.scaling * self.delta()
        if dropout is None and forms(x, self.own_weight, A, B):
            return self._conv_forward(x, self.own_weight + update, bias)
        dropped = x if dropout is None else dropout(x)
        return self._conv_forward(x, self.own_weight, bias) + self._conv_forward(dropped, update.to(x.dtype), None)

    def _padded(self, x: Tensor) -> tuple[Tensor, Geometry]:
        """x, and how the kernel moves over it. x is padded unless the padding is as many zeros on both sides."""
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
