"""The equation of LoRA, for every layer kind, as plain functions of tensors.

    LoRA  (Hu et al. 2021, eq. 3)        y = W x + b + s · B A x
    DoRA  (Liu et al. 2024, eq. 5)       y = g ⊙ (W x + s · B A x) + b,     g = m / ‖W + s · B A‖

W is the frozen weight, A (r, in) projects down, B (out, r) projects up, s is α/r (or α/√r, rsLoRA), and the norm is
taken over each output row. B A is formed only where two thin products over all rows of x would be more work.

Precision: the activations decide it. A and B are usually float32 beside a bfloat16 weight; here they are cast to the
activation's dtype, never the other way round, because a float32 copy of x would cost more memory than all adapters
together. What is merged into a weight (`dense_update`) is computed in float32 at least, and rounded once.

These functions hold no state and no parameters; `layers.py` does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .gradients import Geometry, LoRAConv, LoRAEmbedding, LoRALinear, Way
from .masks import QuickDropout

_BLOCK = 1 << 19  # bytes in the blocks of `add_product`

# Classes of weights that are multiplied as their numbers say. Fake ones are planned with: see training/memory.py.
_PLAIN = (Tensor, nn.Parameter, FakeTensor)

# See `_forming_pays`. Adding matrices is bound by memory: it takes four times as many rows to be no slower on any shape
# that was measured (one CPU thread, widths of 192 to 3072). Thin convolutions are so slow that one time will do.
_LINEAR_GAIN, _CONV_GAIN = 4, 1

Dropout = Callable[[Tensor], Tensor]
Blocks = tuple[tuple[int, int], ...]  # (size, rank) of each block of a fused output: q, k and v in one weight


def precise(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is where it already is that precise."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def dense_update(A: Tensor, B: Tensor) -> Tensor:
    """B A, the matrix (out, in) that the two factors stand for, in float32 at least; the scale is left out.

    Trailing dimensions of a convolution's factors are flattened: A (r, in, *k), B (out, r, 1, …) → (out, in·∏k).
    """
    return precise(B).flatten(1) @ precise(A).flatten(1)


@torch.no_grad()
def add_product(total: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """total ← W + s·B A, summed in float32 at least and rounded once.

    total, weight (…, out, in), strides of any kind; A (…, r, in); B (…, out, r). By blocks that stay in a processor's
    cache, so that neither B A nor a float32 copy of the weight is ever whole.
    """
    if weight.dim() > 2:
        for parts in zip(total, weight, A, B, strict=True):
            add_product(*parts, scale)
        return
    if weight.stride(0) < weight.stride(1):  # stored transposed: the blocks follow the memory
        total, weight, A, B = total.T, weight.T, B.T, A.T
    dtype = torch.promote_types(precise(weight[:0]).dtype, precise(A[:0]).dtype)
    A, B = A.to(dtype), B.to(dtype)
    rows = max(1, _BLOCK // max(weight.shape[1] * A.element_size(), 1))
    for part, base, left in zip(total.split(rows), weight.split(rows), B.split(rows), strict=True):
        part.copy_(torch.addmm(base.to(dtype), left, A, alpha=scale))


def block_diagonal(B: Tensor, blocks: Blocks) -> Tensor:
    """B (Σ sizeᵢ, max r), the rows of the blocks with a rank, as (Σ size, Σ rᵢ): zero outside the blocks.

    Block i takes the next rᵢ columns; a block of rank 0 is zero rows.
    """
    total = sum(rank for _, rank in blocks)
    rows, used, column = [], 0, 0
    for size, rank in blocks:
        if rank:
            block = B[used : used + size, :rank]
            rows.append(F.pad(block, (column, total - column - rank)))
            used, column = used + size, column + rank
        else:
            rows.append(B.new_zeros(size, total))
    return torch.cat(rows)


def row_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + s·B A‖ of each output row (out,), without forming B A.

    ‖w + s·bA‖² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (A Aᵀ) bᵀ  for a row w of W and b of B: all products are thin.

    weight (out, in), strides of any kind; A (r, in); B (out, r). Sums are in float32 at least; the product with a
    weight of lower precision is made in that precision, so that no copy of the weight is.
    """
    A, B = precise(A), precise(B)
    # The sum of squares accumulates in float32 without a float32 copy of the weight.
    weight_sq = torch.linalg.vector_norm(weight, dim=1, dtype=A.dtype).square()
    projected = precise(weight @ A.to(weight.dtype).T) if weight.dtype != A.dtype else weight @ A.T
    cross = (projected * B).sum(1)
    update_sq = ((B @ (A @ A.T)) * B).sum(1)
    # Rounding may leave a tiny negative number where W + s·BA is almost zero.
    norm_sq: Tensor = weight_sq + 2 * scale * cross + scale**2 * update_sq
    return norm_sq.clamp_min(0).sqrt()


def dora_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """m / ‖W + s·BA‖ (out,). The norm is a constant for the gradient (DoRA, section 4.3)."""
    norm = norm.detach()
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)


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
    """x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ; with `gain`, everything but the bias times it.

    x (…, in)   weight (out, in)   bias (out)   A (r, in)   B (out, r)   gain (out)   →   (…, out)
    """
    x = _autocast(x)
    # A weight of another class (quantised, sharded) knows how to be multiplied in F.linear, and may know no more.
    if _is_known(dropout) and type(weight) in _PLAIN and not _is_transformed():
        way = _way(x, weight, A, B, gain) if dropout is None else "beside"
        inputs: tuple[Any, ...] = (x, weight, bias, A, B, gain, scale, dropout, way)
        if not torch.is_grad_enabled():
            return LoRALinear.value(*inputs)[0]
        fused: Tensor = LoRALinear.apply(*inputs)
        return fused
    # The scale is applied to the thin product (…, r), the smallest tensor in sight.
    S = F.linear(x if dropout is None else dropout(x), A.to(x.dtype)) * scale
    if gain is None:
        return F.linear(x, weight, bias) + F.linear(S, B.to(x.dtype))
    y = (F.linear(x, weight) + F.linear(S, B.to(x.dtype))) * gain.to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _way(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None) -> Way:
    """How `LoRALinear` had best compute a layer without dropout."""
    rows = x.numel() // max(x.shape[-1], 1)
    if gain is None and forms(x, weight, A, B) and _forming_pays(rows, weight, _LINEAR_GAIN):
        return "formed"
    return "few" if rows <= len(A) else "beside"  # few: when text is generated


def lora_embedding(
    tokens: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
    dropout: Dropout | None = None,
) -> Tensor:
    """base + s · A[:, tokens]ᵀ Bᵀ, the update of an embedding looked up, never formed.

    tokens (…)   base (…, dim) already looked up   A (r, vocabulary)   B (dim, r)   →   (…, dim)

    The padding column of A gets no gradient, so a padding row that starts without an update keeps none. The input of an
    embedding is a row with a single one, at its token: dropping it drops the update of the whole token.
    """
    kept = None if dropout is None else dropout(base.new_ones(tokens.shape))
    if not _is_transformed():
        added: Tensor = LoRAEmbedding.apply(base, tokens, A, B, kept, scale, padding_idx, scale_grad_by_freq)
        return added
    down = F.embedding(tokens, A.T, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    if kept is not None:
        down = down * kept[..., None]
    return base + F.linear((down * scale).to(base.dtype), B.to(base.dtype))


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
    """conv(x, W) + b + s · conv₁(conv(dropout(x), A), B), conv₁ with a kernel of ones.

    x (N, in, …) or (in, …)   weight (out, in, *k)   A (r, in, *k)   B (out, r, 1, …)   →   (N, out, …) or (out, …)
    """
    x = _autocast(x)
    if x.dim() == weight.dim() - 1:
        return lora_conv(x[None], weight, bias, A, B, scale, geometry, dropout)[0]
    if _is_known(dropout) and type(weight) in _PLAIN and not _is_transformed():
        positions = x.numel() // max(x.shape[1] * math.prod(geometry.stride), 1)
        formed = dropout is None and forms(x, weight, A, B) and _forming_pays(positions, weight, _CONV_GAIN)
        fused: Tensor = LoRAConv.apply(x, weight, bias, A, B, scale, dropout, geometry, formed)
        return fused
    S = geometry.convolution(x if dropout is None else dropout(x), A.to(x.dtype)) * scale
    y = geometry.convolution(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return y + Geometry.of_ones(B).convolution(S, B.to(x.dtype))


def _is_known(dropout: Dropout | None) -> bool:
    """Whether the hand-written gradients can draw this dropout's mask: of another class, only its forward is known."""
    return dropout is None or (
        isinstance(dropout, nn.Dropout)
        and type(dropout) in (nn.Dropout, QuickDropout)
        and dropout.training
        and dropout.p < 1
    )


def forms(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether W + s·B A may be formed in the precision of these tensors.

    Never in half precision: an update smaller than the weight's last digit vanishes when the sum is rounded.
    """
    dtype = _dtype(x)
    return dtype == weight.dtype == A.dtype == B.dtype and dtype in (torch.float32, torch.float64)


def _forming_pays(rows: int, weight: Tensor, gain: int) -> bool:
    """Whether forming W + s·B A once for each pass is less work than two thin products over all rows of x.

    By arithmetic from T = 2·in·out/(in + out) rows on: 2·r·in·out operations twice, against 2·T·r·(in + out). `gain` is
    how many times that arithmetic has to say so.
    """
    outputs = len(weight)
    inputs = weight.numel() // max(outputs, 1)
    return rows * (inputs + outputs) >= gain * 2 * inputs * outputs


def _autocast(x: Tensor) -> Tensor:
    """`x` as autocast would cast it, once: left to itself autocast casts, and keeps, a copy for each product."""
    return x.to(_dtype(x))


def _dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: its own, or autocast's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _is_transformed() -> bool:
    """Whether something rewrites the computation: torch.compile, which fuses the plain equation better than any
    hand-written gradient, or a torch.func transform (vmap, jvp), which knows the plain operations only.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
