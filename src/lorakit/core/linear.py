"""A linear layer and its low-rank update, in one product.

    y = x Wᵀ + b + s · x Aᵀ Bᵀ                 LoRA (Hu et al. 2021, eq. 3, written for rows)
    y = g ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + b           DoRA (Liu et al. 2024, eq. 5), g = m / ‖W + s·B A‖ from `matrix.py`

W is frozen. A projects x down to r numbers, B projects them up to the output; s is α/r, or α/√r (rsLoRA,
Kalajdzievski 2023). In training, dropout acts only on the x that A reads. B A is as large as W, so x Aᵀ and S Bᵀ are
computed instead: with r far below in and out, two thin products are far less work.

    x (4, 128, 576) → X (512, 576)    512 rows, because 4 sequences of 128 tokens are one matrix
    W (1536, 576)                     each of 1536 outputs reads 576 inputs
    A (16, 576)                       r = 16: the directions along which the input is measured
    S = s · X Aᵀ (512, 16)            16 numbers for each token
    B (1536, 16)                      each output is a combination of these 16 numbers
    y (4, 128, 1536)

X Wᵀ takes 2·512·576·1536 = 906 million operations, the thin products 2·512·16·(576 + 1536) = 35 million.

Three parts: the equation as torch's operations; its gradient written out, because torch's own would keep and move more
than it needs; and `lora_linear`, which chooses. Tensors of rank r are cast to x's dtype, and not x to theirs unless it
has few rows: a float32 copy of a large x would cost more memory than all adapters together.

Not here: state and parameters (the layers have them), and adding s·B A to W permanently (merging).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .autograd import by_hand, cast, reshaped, without_autocast
from .dropout import Dropout, Mask, draw_mask
from .matrix import forming_pays, forms, summed


def plain_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: Dropout | None,
    gain: Tensor | None,
) -> Tensor:
    """The equation, as torch's own operations. Shapes are those of `lora_linear`."""
    S = F.linear(x if dropout is None else dropout(x), A.to(x.dtype)) * scale  # (…, r): the smallest tensor is scaled
    if gain is None:
        return F.linear(x, weight, bias) + F.linear(S, B.to(x.dtype))
    y = (F.linear(x, weight) + F.linear(S, B.to(x.dtype))) * gain.to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


Way = Literal["beside", "formed", "few"]  # see `LoRALinear`


class LoRALinear(torch.autograd.Function):
    """The equation with its gradient written out. A d before a letter means the gradient with respect to it.

    u = x Wᵀ + S Bᵀ,  S = s · (M ⊙ x) Aᵀ,  y = g ⊙ u + b        M: dropout's mask over 1 − p, or 1; g (out), or 1

    du = g ⊙ dy           dg = Σ dy ⊙ u        db = Σ dy
    dS = s · du B         dx = M ⊙ (dS A) + du W
    dA = dSᵀ (M ⊙ x)      dB = (Sᵀ du)ᵀ

    Kept: x once, S (T, r), the mask's few bytes (`dropout.py`); and u, if g is trained. Autograd would also keep the
    dropped x, and a byte for each element of the mask.

    It is faster, because the product with W is added to the update in the same operation (`addmm_`): the sum needs no
    pass of its own, and in bfloat16 only the small summand is rounded before it. The thin products are written in the
    order that is fast on a CPU. It can be differentiated twice, because backward consists of differentiable operations.

    way ("formed" and "few" are for layers without dropout):

    "beside"  the thin products are made beside the dense one
    "formed"  W + s·B A is made and takes the place of W. It is not kept but made again for dx. Needs all tensors of one
              dtype, and no gain. Kept: x.
    "few"     as "beside", but x is cast to the dtype of A and B, which is less work if x has at most r rows
    """

    @staticmethod
    def value(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        scale: float,
        dropout: nn.Dropout | None,
        way: Way,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Mask]:
        """y; S and u, or None if they were not made; and the mask."""
        rows = x.reshape(-1, x.shape[-1])
        S = u = None
        mask = Mask() if dropout is None else draw_mask(x, dropout, len(A))
        if way == "formed":
            y = F.linear(rows, summed(weight, A, B, scale), bias)
        elif way == "few":
            S = F.linear(rows.to(A.dtype), A).mul_(scale)
            y = F.linear(rows, weight.to(x.dtype), None if bias is None or gain is not None else bias.to(x.dtype))
            y = y.add_(F.linear(S, B))
        else:
            S = mask.shrink(rows, A.to(x.dtype)).mul_(scale / (1 - mask.p))
            B_ = B.to(x.dtype)
            y = S @ B_.T if bias is None or gain is not None else torch.addmm(bias.to(x.dtype), S, B_.T)
            y = y.addmm_(rows, weight.to(x.dtype).T)
        if gain is not None:
            u, gain_ = y, gain.to(x.dtype)
            y = u * gain_ if bias is None else torch.addcmul(bias.to(x.dtype), u, gain_)
        return reshaped(y, (*x.shape[:-1], y.shape[-1])), S, u, mask

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, _, A, B, gain, scale, _, way = inputs
        y, S, u, mask = LoRALinear.value(*inputs)
        ctx.mask_class, ctx.p, ctx.scale, ctx.way = type(mask), mask.p, scale / (1 - mask.p), way
        _, _, _, _, needs_B, needs_gain, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x, weight, A, B, gain, S if needs_B else None, u if needs_gain else None, mask.packed)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, A, B, gain, S, u, packed = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_gain, *_ = ctx.needs_input_grad
        with without_autocast(dy):
            rows, dY = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            mask = ctx.mask_class(packed, ctx.p)
            A_, B_ = A.to(dy.dtype), B.to(dy.dtype)
            # If a gradient of this gradient is wanted, S and u are computed again: the kept ones have no history.
            again = torch.is_grad_enabled()
            if needs_B or (needs_gain and again):
                S = mask.shrink(rows, A_) * ctx.scale if S is None or again else S.to(dy.dtype)
            dg = None
            if needs_gain:
                u = rows @ weight.to(dy.dtype).T + S @ B_.T if again else u
                dg = (dY * u).sum(0)
            db = dY.sum(0) if needs_bias else None
            dU = dY if gain is None else dY * gain.to(dy.dtype)
            dS = dB = dx = None
            if needs_B and not again:
                dS, dB = kernels.grad_S_B(dU, B, S, ctx.scale)
            else:
                dS = (dU @ B_) * ctx.scale
                dB = (S.T @ dU).T if needs_B else None
            if needs_x and ctx.way == "formed":
                dx = (dU @ summed(weight, A, B, ctx.scale)).view(x.shape)
            elif needs_x:
                dx = mask.gradient_of_x(dU, weight.to(dy.dtype), dS, A_).view(x.shape)
            dW = dU.T @ rows if needs_weight else None
            dA = mask.gradient_of_A(dS, rows) if needs_A else None
            return dx, dW, db, dA, dB, dg, None, None, None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    dropout: Dropout | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ; with `gain`, everything but the bias is multiplied by it.

    x (…, in)   weight (out, in)   bias (out)   A (r, in)   B (out, r)   gain (out)   →   (…, out)

    Kept for the backward pass: x, S (…, r) and dropout's few bytes; with a trained gain, also the output before it; if
    W + s·B A is formed, only x. Source: Hu et al. 2021, eq. 3; for the gain, Liu et al. 2024, eq. 5.
    """
    x = cast(x)
    if by_hand(weight, dropout):
        inputs: tuple[Any, ...] = (x, weight, bias, A, B, gain, scale, dropout, _way(x, weight, A, B, gain, dropout))
        y: Tensor = LoRALinear.apply(*inputs) if torch.is_grad_enabled() else LoRALinear.value(*inputs)[0]
        return y
    return plain_linear(x, weight, bias, A, B, scale, dropout, gain)


def _way(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None, dropout: Dropout | None) -> Way:
    """The best way for `LoRALinear` to compute this layer."""
    if dropout is not None:
        return "beside"
    rows = x.numel() // max(x.shape[-1], 1)
    # With four times as many rows as the count of operations asks for, forming was not slower on any measured shape
    # (one CPU thread, widths of 192 to 3072).
    if gain is None and forms(x, weight, A, B) and forming_pays(rows, weight, 4):
        return "formed"
    return "few" if rows <= len(A) else "beside"  # few: text is being generated
