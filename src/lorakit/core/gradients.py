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

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .masks import Mask, draw_mask

Way = Literal["beside", "formed", "few"]  # see `LoRALinear`


class LoRALinear(torch.autograd.Function):
    """u = x Wᵀ + S Bᵀ,  S = s · (M ⊙ x) Aᵀ,  y = g ⊙ u + b        M: dropout's mask over 1 − p, or 1; g (out), or 1

    du = g ⊙ dy           dg = Σ dy ⊙ u        db = Σ dy
    dS = s · du B         dx = M ⊙ (dS A) + du W
    dA = dSᵀ (M ⊙ x)      dB = (Sᵀ du)ᵀ

    Kept: x, S, the mask's few bytes; and u, where g is trained.

    way, where the others than "beside" are for layers without dropout:

    "beside"  the thin products are made beside the dense one
    "formed"  W + s·B A is made and takes the place of W. It is not kept but made again for dx. Needs all tensors of one
              dtype, and no gain. Kept: x.
    "few"     beside, but x is cast to the dtype of A and B: for fewer rows than they have the lesser work
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
        """y, and S, u and the mask where they were made on the way."""
        rows = x.reshape(-1, x.shape[-1])
        S = u = None
        mask = Mask() if dropout is None else draw_mask(x, dropout, len(A))
        if way == "formed":
            y = F.linear(rows, _sum(weight, A, B, scale), bias)
        elif way == "few":
            S = F.linear(rows.to(A.dtype), A).mul_(scale)
            y = F.linear(rows, weight.to(x.dtype), None if bias is None or gain is not None else bias.to(x.dtype))
            y = y.add_(F.linear(S, B))
        else:
            S = mask.shrink(rows, A.to(x.dtype)).mul_(scale / (1 - mask.p))
            y = _on_top(rows, weight, bias if gain is None else None, S, B)
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
            # Where a gradient of this gradient was asked for, what was kept has no history.
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
                dx = (dU @ _sum(weight, A, B, ctx.scale)).view(x.shape)
            elif needs_x:
                dx = mask.gradient_of_x(dU, weight.to(dy.dtype), dS, A_).view(x.shape)
            dW = dU.T @ rows if needs_weight else None
            dA = mask.gradient_of_A(dS, rows) if needs_A else None
            return dx, dW, db, dA, dB, dg, None, None, None


def reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nobody else holds, in another shape, and no view of it.

    What a layer returns may be written on (`relu_`, `y += residual`). Autograd forbids that for a view that was made
    inside a Function or under `no_grad`. torch's own F.linear gives its rows their shape in this way too.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return fresh.view(shape)  # the trace takes the sizes of this call for constants in an operation of no name
    result: Tensor = torch.ops.aten._unsafe_view.default(fresh, shape)
    return result


def _on_top(x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, B: Tensor) -> Tensor:
    """x Wᵀ + b + S Bᵀ. The large product is added to the thin one, so that the small summand alone is rounded before
    the sum.
    """
    B = B.to(x.dtype)
    y = S @ B.T if bias is None else torch.addmm(bias.to(x.dtype), S, B.T)
    return y.addmm_(x, weight.to(x.dtype).T)


def _sum(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + s·B A, a convolution's read as matrices and laid out as its kernel."""
    return torch.addmm(weight.flatten(1), B.flatten(1), A.flatten(1), alpha=scale).view(weight.shape)


class LoRAEmbedding(torch.autograd.Function):
    """y = base + s · Sᵀ Bᵀ,  S = m ⊙ A[:, tokens]       base (…, dim): the frozen rows, looked up

    A (r, vocabulary)   B (dim, r)   m (…): dropout's mask over the tokens, with its 1/(1 − p); or 1

    dbase = dy      dS = s · Bᵀ dyᵀ      dA[:, tokens] += m ⊙ dS      dB = (S dy)ᵀ

    padding_idx: a column of A without a gradient. by_frequency: a column's gradient is over how often it was looked up.
    Kept: the tokens and m.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        tokens: Tensor,
        A: Tensor,
        B: Tensor,
        kept: Tensor | None,
        scale: float,
        padding_idx: int | None,
        by_frequency: bool,
    ) -> Tensor:
        ctx.scale, ctx.padding_idx, ctx.by_frequency = scale, padding_idx, by_frequency
        ctx.save_for_backward(tokens, A, B, kept)
        rows = base.reshape(-1, base.shape[-1])
        S = _columns(A, tokens.reshape(-1), kept, base.dtype)
        with without_autocast(base):
            return reshaped(torch.addmm(rows, S.T, B.to(base.dtype).T, alpha=scale), base.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        tokens, A, B, kept = ctx.saved_tensors
        needs_base, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        with without_autocast(dy):
            dY, tokens = dy.reshape(-1, dy.shape[-1]), tokens.reshape(-1)
            dA = dB = None
            if needs_A:
                dS = (B.to(dy.dtype).T @ dY.T) * ctx.scale
                dS = dS if kept is None else dS * kept.reshape(-1).to(dS.dtype)
                dA = torch.zeros_like(A).index_add(1, tokens, dS.to(A.dtype))
                if ctx.padding_idx is not None:
                    dA = dA.index_fill(1, tokens.new_tensor(ctx.padding_idx), 0)
                if ctx.by_frequency:
                    dA = dA / tokens.bincount(minlength=A.shape[1]).clamp(min=1)
            if needs_B:
                dB = (_columns(A, tokens, kept, dy.dtype) @ dY).T * ctx.scale
        return (dy if needs_base else None), None, dA, dB, None, None, None, None


def _columns(A: Tensor, tokens: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """m ⊙ A[:, tokens]     tokens (T,) → (r, T)"""
    S = A.index_select(1, tokens).to(dtype)
    return S if kept is None else S * kept.reshape(-1).to(dtype)


class LoRAConv(torch.autograd.Function):
    """y = conv(x, W) + b + conv₁(S, B),  S = s · conv(M ⊙ x, A)

    x (N, in, …)   W (out, in, *k)   A (r, in, *k)   B (out, r, 1, …)   conv₁: a kernel of ones   M: as in `LoRALinear`

    The gradients are those of `LoRALinear`, its products read as convolutions, `formed` too. If not formed, and without
    dropout, W and A are laid together as one kernel of out + r channels: they are small beside x, and r channels more
    take next to no time, where a convolution to r channels by itself takes a quarter of that to 64.

    Kept: x, S and the mask's few bytes; formed: x.
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
            return geometry.convolution(x, _sum(weight, A, B, scale), bias)
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
                dx, _ = geometry.gradients(dy, x, _sum(weight, A, B, ctx.scale), True, False)
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


@dataclass(frozen=True)
class Geometry:
    """How a kernel moves over its input, padded with zeros: what a convolution takes beside its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of_ones(cls, kernel: Tensor) -> Geometry:
        """That of a kernel (out, in, 1, …) of ones."""
        ones = tuple(kernel.shape[2:])
        return cls(ones, (0,) * len(ones), ones)

    def convolution(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        unmoved = (0,) * len(self.stride)
        return torch.convolution(x, kernel, bias, self.stride, self.padding, self.dilation, False, unmoved, 1)

    def gradients(self, dy: Tensor, x: Any, kernel: Tensor, needs_x: bool, needs_kernel: bool) -> tuple[Any, Any]:
        """With respect to x and the kernel, None for what is not needed."""
        if not (needs_x or needs_kernel):
            return None, None
        unmoved, wanted = (0,) * len(self.stride), [needs_x, needs_kernel, False]
        dx, dkernel, _ = torch.ops.aten.convolution_backward(
            dy, x, kernel, None, self.stride, self.padding, self.dilation, False, unmoved, 1, wanted
        )
        return dx, dkernel


def _pointwise(x: Tensor, kernel: Tensor) -> Tensor:
    """conv₁(x, kernel): matrix products where each channel's plane is whole in memory, which are faster."""
    if not x.is_contiguous():
        return Geometry.of_ones(kernel).convolution(x, kernel)
    return torch.bmm(_for_each(x, kernel), x.flatten(2)).view(len(x), len(kernel), *x.shape[2:])


def _add_pointwise(y: Tensor, x: Tensor, kernel: Tensor) -> Tensor:
    """y + conv₁(x, kernel)"""
    if not x.is_contiguous():
        return y + _pointwise(x, kernel)
    return reshaped(torch.baddbmm(y.flatten(2), _for_each(x, kernel), x.flatten(2)), y.shape)


def _for_each(x: Tensor, kernel: Tensor) -> Tensor:
    """A kernel of ones as a matrix, for each element of the batch."""
    return kernel.flatten(1).expand(len(x), -1, -1)


def _inner(x: Tensor, channels_last: bool) -> Tensor:
    """x (N, channels, …) with its dimensions in the order of its memory."""
    return x.movedim(1, -1) if channels_last else x


def _masked(mask: Mask, x: Tensor, channels_last: bool) -> Tensor:
    """M ⊙ x for a mask of `_inner(x)`."""
    inner = _inner(x, channels_last)
    masked = mask.masked(inner.reshape(-1, inner.shape[-1])).view(inner.shape)
    return masked.movedim(-1, 1) if channels_last else masked


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given, also when backward() is called inside autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
