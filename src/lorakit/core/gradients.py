"""The gradients of LoRA's equation written out, where autograd's own would keep or move more than they need.

Left to autograd, each sum of the frozen layer's output and the update's costs a pass over a second tensor of its size,
in the forward pass and again for the gradient; the dropped input is kept beside the input, and a mask of a byte for
each element beside both. Here

- the input is kept once, dropout's mask in a few bits an element (`masks.py`), and the thin product S (T, r);
- the product with the frozen weight is made on top of the update, by a matrix product that adds to what is there. That
  spares the pass and, because only the small summand is rounded before the sum, a part of bfloat16's rounding error;
- the thin products are written in the order that a CPU is fast at;
- tensors of rank r alone are cast to the input's dtype.

x (T, in), W (out, in), A (r, in), B (out, r), S (T, r); d before a letter is the gradient with respect to it. Each
function can be differentiated twice: what a backward pass does is made of differentiable operations. None of them
chooses anything; `functional.py` does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .masks import Mask, draw_mask


class LoRALinear(torch.autograd.Function):
    """u = x Wᵀ + S Bᵀ,  S = s · (M ⊙ x) Aᵀ,  y = g ⊙ u + b        M: dropout's mask over 1 − p, or 1; g (out), or 1

    du = g ⊙ dy           dg = Σ dy ⊙ u        db = Σ dy
    dS = s · du B         dx = M ⊙ (dS A) + du W
    dA = dSᵀ (M ⊙ x)      dB = (Sᵀ du)ᵀ

    Kept: x, S, the mask's few bytes; and u, where g is trained.

    formed: W + s·B A is made, and used in the place of W: one dense product instead of a dense and two thin ones. It is
    not kept but made again for dx. Needs all tensors of one dtype, no dropout and no gain. Kept: x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        scale: float,
        dropout: nn.Dropout | None,
        formed: bool,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        mask = Mask() if dropout is None else draw_mask(x, dropout)
        ctx.scale = scale if dropout is None else scale / (1 - dropout.p)
        ctx.mask_class, ctx.formed = type(mask), formed
        S = u = None
        bias = None if bias is None else bias.to(x.dtype)
        if formed:
            y = F.linear(rows, torch.addmm(weight, B, A, alpha=scale), bias)
        else:
            S, Bt = mask.shrink(rows, A.to(x.dtype)).mul_(ctx.scale), B.to(x.dtype).T
            y = S @ Bt if bias is None or gain is not None else torch.addmm(bias, S, Bt)
            y.addmm_(rows, weight.to(x.dtype).T)
            if gain is not None:
                u, gain_ = y, gain.to(x.dtype)
                y = u * gain_ if bias is None else torch.addcmul(bias, u, gain_)
        *_, needs_B, needs_gain, _, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(x, weight, A, B, gain, S if needs_B else None, u if needs_gain else None, mask.packed)
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, A, B, gain, S, u, packed = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_A, needs_B, needs_gain, *_ = ctx.needs_input_grad
        with without_autocast(dy):
            rows, dY = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
            mask = ctx.mask_class(packed)
            weight_, A_, B_ = (factor.to(dy.dtype) for factor in (weight, A, B))
            # Where a gradient of this gradient was asked for, what was kept has no history.
            again = torch.is_grad_enabled()
            if needs_B and (S is None or again):
                S = mask.shrink(rows, A_) * ctx.scale
            dg = None
            if needs_gain:
                u = rows @ weight_.T + S @ B_.T if again else u
                dg = (dY * u).sum(0)
            db = dY.sum(0) if needs_bias else None
            dU = dY if gain is None else dY * gain.to(dy.dtype)
            dS = (dU @ B_).mul_(ctx.scale) if needs_A or (needs_x and not ctx.formed) else None
            dx = None
            if needs_x:
                if ctx.formed:
                    dx = dU @ torch.addmm(weight, B, A, alpha=ctx.scale)
                else:
                    dx = mask.expand(dS, A_).addmm_(dU, weight_)
                dx = dx.view(x.shape)
            dW = dU.T @ rows if needs_weight else None
            dA = mask.gradient_of_A(dS, rows) if needs_A else None
            dB = (S.T @ dU).T if needs_B else None
            return dx, dW, db, dA, dB, dg, None, None, None


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given, also when backward() is called inside autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
