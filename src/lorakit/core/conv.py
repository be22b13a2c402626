"""A convolution and its low-rank update: two thin convolutions beside the dense one.

    y = conv(x, W) + b + s · conv₁(conv(x, A), B)          conv₁: kernel size 1

Hu et al. 2021, eq. 3, at each position: W, seen as a matrix (out, in·∏k), gets the update s·B A. A is a convolution of
W's kernel size to r channels, and B mixes these r channels at each position. In training, dropout acts only on the x
that A reads.

    x (8, 64, 28, 28)      8 images of 64 channels
    W (64, 64, 3, 3)       64 outputs; each reads 3 × 3 positions of 64 channels
    A (16, 64, 3, 3)       r = 16: like W, with 16 outputs
    S (8, 16, 28, 28)      16 numbers for each position; 28 stays 28, because a padding of 1 fits a kernel of 3
    B (64, 16, 1, 1)       each of 64 outputs is a combination of the 16 numbers at its position
    y (8, 64, 28, 28)

It works in any number of dimensions. Not here: groups and loralib's layout of the factors, for which the layer forms
the kernel of ΔW, and the gain, by which the layer multiplies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import by_hand, cast, reshaped, without_autocast
from .dropout import Dropout, Mask, draw_mask
from .matrix import forming_pays, forms, summed


def plain_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    geometry: Geometry,
    dropout: Dropout | None,
) -> Tensor:
    """The equation, as torch's own operations. Shapes are those of `lora_conv`."""
    S = geometry.convolution(x if dropout is None else dropout(x), A.to(x.dtype)) * scale  # (N, r, …)
    y = geometry.convolution(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y + Geometry.of_ones(B).convolution(S, B.to(x.dtype))


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input, padded with zeros: what a convolution takes beside its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of_ones(cls, kernel: Tensor) -> Geometry:
        """The geometry of a kernel (out, in, 1, …) of size 1."""
        ones = tuple(kernel.shape[2:])
        return cls(ones, (0,) * len(ones), ones)

    def convolution(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        unmoved = (0,) * len(self.stride)
        return torch.convolution(x, kernel, bias, self.stride, self.padding, self.dilation, False, unmoved, 1)

    def gradients(self, dy: Tensor, x: Any, kernel: Tensor, needs_x: bool, needs_kernel: bool) -> tuple[Any, Any]:
        """The gradients with respect to x and the kernel, None if not needed."""
        if not (needs_x or needs_kernel):
            return None, None
        unmoved, wanted = (0,) * len(self.stride), [needs_x, needs_kernel, False]
        dx, dkernel, _ = torch.ops.aten.convolution_backward(
            dy, x, kernel, None, self.stride, self.padding, self.dilation, False, unmoved, 1, wanted
        )
        return dx, dkernel


class LoRAConv(torch.autograd.Function):
    """The equation with its gradient written out, as in `LoRALinear`, with convolutions for products.

    y = conv(x, W) + b + conv₁(S, B),  S = s · conv(M ⊙ x, A)        M: dropout's mask over 1 − p, or 1

    dS = s · conv₁(dy, Bᵀ)      dx = M ⊙ ∂conv(dS, A)/∂x + ∂conv(dy, W)/∂x      dA, dB, dW: as kernels have them

    Kept: x, S and the mask's few bytes (`dropout.py`); if formed, only x.

    formed: W + s·B A is made and takes the place of W, in both passes. If not formed, and without dropout, W and A are
    joined to one kernel of out + r channels. They are small beside x, and r more channels take almost no time, while a
    separate convolution to r channels takes a quarter of the time of one to 64.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: nn.Dropout | None,
        geometry: Geometry,
        formed: bool,
    ) -> Tensor:
        channels_last = not x.is_contiguous()
        mask = Mask() if dropout is None else draw_mask(_inner(x, channels_last), dropout, len(A))
        ctx.scale = scale if dropout is None else scale / (1 - dropout.p)
        ctx.mask_class, ctx.p, ctx.geometry, ctx.channels_last = type(mask), mask.p, geometry, channels_last
        ctx.formed = formed
        if formed:
            ctx.save_for_backward(x, weight, A, B, None, None)
            return geometry.convolution(x, summed(weight, A, B, scale), bias)
        weight_, A_ = weight.to(x.dtype), A.to(x.dtype)
        bias_ = None if bias is None else bias.to(x.dtype)
        if dropout is None:
            bias_ = None if bias_ is None else F.pad(bias_, (0, len(A)))
            both = geometry.convolution(x, torch.cat((weight_, A_)), bias_)
            y, S = both.split((len(weight), len(A)), 1)
        else:
            y, S = geometry.convolution(x, weight_, bias_), geometry.convolution(_masked(mask, x, channels_last), A_)
        S = S * ctx.scale
        y = _add_pointwise(y, S, B.to(x.dtype))
        ctx.save_for_backward(x, weight, A, B, S if ctx.needs_input_grad[4] else None, mask.packed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, A, B, S, packed = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, *_ = ctx.needs_input_grad
        geometry, channels_last = ctx.geometry, ctx.channels_last
        with without_autocast(dy):
            mask = ctx.mask_class(packed, ctx.p)
            weight_, A_, B_ = (factor.to(dy.dtype) for factor in (weight, A, B))
            remakes_S = needs_B and (S is None or torch.is_grad_enabled())
            dropped = _masked(mask, x, channels_last) if needs_A or remakes_S else x
            if remakes_S:
                S = geometry.convolution(dropped, A_) * ctx.scale
            dS = _pointwise(dy, B_.transpose(0, 1)) * ctx.scale
            dx = None
            if needs_x and ctx.formed:
                dx, _ = geometry.gradients(dy, x, summed(weight, A, B, ctx.scale), True, False)
            elif needs_x and packed is None:
                together = torch.cat((dy, dS), 1), x, torch.cat((weight_, A_))
                dx, _ = geometry.gradients(*together, True, False)
            elif needs_x:
                beside, _ = geometry.gradients(dS, x, A_, True, False)
                dx = geometry.gradients(dy, x, weight_, True, False)[0] + _masked(mask, beside, channels_last)
            _, dW = geometry.gradients(dy, x, weight_, False, needs_weight)
            _, dA = geometry.gradients(dS, dropped, A_, False, needs_A)
            _, dB = Geometry.of_ones(B).gradients(dy, S, B_, False, needs_B)
            db = dy.flatten(2).sum((0, 2)) if needs_bias else None
        return dx, dW, db, dA, dB, None, None, None, None


def lora_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    geometry: Geometry,
    dropout: Dropout | None = None,
) -> Tensor:
    """conv(x, W) + b + s · conv₁(conv(dropout(x), A), B), where conv₁ has kernel size 1.

    x (N, in, …) or (in, …)   weight (out, in, *k)   A (r, in, *k)   B (out, r, 1, …)   →   (N, out, …) or (out, …)

    Kept for the backward pass: x, S (N, r, …) and dropout's few bytes; if W + s·B A is formed, only x. Source: Hu et
    al. 2021, eq. 3, on the kernel seen as a matrix; the two thin convolutions are PEFT's layout of the factors.
    """
    x = cast(x)
    if x.dim() == weight.dim() - 1:
        return lora_conv(x[None], weight, bias, A, B, scale, geometry, dropout)[0]
    if by_hand(weight, dropout):
        formed = dropout is None and _forms(x, weight, A, B, geometry)
        y: Tensor = LoRAConv.apply(x, weight, bias, A, B, scale, dropout, geometry, formed)
        return y
    return plain_conv(x, weight, bias, A, B, scale, geometry, dropout)


def _forms(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, geometry: Geometry) -> bool:
    """Whether W + s·B A is formed. Thin convolutions are so slow that this pays as soon as it saves operations."""
    positions = x.numel() // max(x.shape[1] * math.prod(geometry.stride), 1)
    return forms(x, weight, A, B) and forming_pays(positions, weight, 1)


def _pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    """conv₁(x, kernel). If each channel's plane is contiguous in memory, it is a matrix product, which is faster."""
    if not x.is_contiguous():
        return Geometry.of_ones(kernel).convolution(x, kernel)
    return torch.bmm(_for_each(x, kernel), x.flatten(2)).view(len(x), len(kernel), *x.shape[2:])


def _add_pointwise(y: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """y + conv₁(x, kernel)"""
    if not x.is_contiguous():
        return y + _pointwise(x, kernel)
    return reshaped(torch.baddbmm(y.flatten(2), _for_each(x, kernel), x.flatten(2)), y.shape)


def _for_each(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel of size 1 as a matrix, repeated for each element of the batch."""
    return kernel.flatten(1).expand(len(x), -1, -1)


def _inner(x: Tensor, channels_last: bool) -> Tensor:
    """x (N, channels, …) with its dimensions in the order of its memory."""
    return x.movedim(1, -1) if channels_last else x


def _masked(mask: Mask, x: Tensor, channels_last: bool) -> Tensor:
    """M ⊙ x for a mask of `_inner(x)`."""
    inner = _inner(x, channels_last)
    masked = mask.masked(inner.reshape(-1, inner.shape[-1])).view(inner.shape)
    return masked.movedim(-1, 1) if channels_last else masked
