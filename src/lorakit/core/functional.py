"""The equation of LoRA, for every layer kind, as plain functions of tensors.

    LoRA  (Hu et al. 2021, eq. 3)        y = W x + b + s · B A x
    DoRA  (Liu et al. 2024, eq. 5)       y = g ⊙ (W x + s · B A x) + b,     g = m / ‖W + s · B A‖

W is the frozen weight, A (r, in) projects down, B (out, r) projects up, s is α/r (or α/√r, rsLoRA), and the norm is
taken over each output row. B A is never formed where the layer allows two thin products instead of one dense one.

Precision: the activations decide it. A and B are usually float32 beside a bfloat16 weight; here they are cast to the
activation's dtype, never the other way round, because a float32 copy of x would cost more memory than all adapters
together. What is merged into a weight (`dense_update`) is computed in float32 at least, and rounded once.

These functions hold no state and no parameters; `layers.py` does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Dropout = Callable[[Tensor], Tensor]


def precise(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or as it is where it already is that precise."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def dense_update(A: Tensor, B: Tensor) -> Tensor:
    """B A, the matrix (out, in) that the two factors stand for, in float32 at least; the scale is left out.

    Trailing dimensions of a convolution's factors are flattened: A (r, in, *k), B (out, r, 1, …) → (out, in·∏k).
    """
    return precise(B).flatten(1) @ precise(A).flatten(1)


def row_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + s·B A‖ of each output row (out,), without forming B A.

    ‖w + s·bA‖² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (A Aᵀ) bᵀ  for a row w of W and b of B: all products are thin.

    weight (out, in), strides of any kind; A (r, in); B (out, r). Computed in float32 at least.
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
    dropout: Dropout,
    gain: Tensor | None = None,
) -> Tensor:
    """x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ, without forming B A; with `gain`, everything but the bias times it.

    x (…, in)   weight (out, in)   bias (out)   A (r, in)   B (out, r)   gain (out)   →   (…, out)
    """
    x = _autocast(x)
    A, B = A.to(x.dtype), B.to(x.dtype)
    # The scale is applied to the thin product (…, r), the smallest tensor in sight.
    update = F.linear(F.linear(dropout(x), A) * scale, B)
    if gain is None:
        return F.linear(x, weight, bias) + update
    y = (F.linear(x, weight) + update) * gain.to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def lora_embedding(
    tokens: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    padding_idx: int | None,
    scale_grad_by_freq: bool,
) -> Tensor:
    """base + s · A[:, tokens]ᵀ Bᵀ, the update of an embedding looked up, never formed.

    tokens (…)   base (…, dim) already looked up   A (r, vocabulary)   B (dim, r)   →   (…, dim)

    The padding column of A gets no gradient, so a padding row that starts without an update keeps none.
    """
    down = F.embedding(tokens, A.T, padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return base + F.linear((down * scale).to(base.dtype), B.to(base.dtype))


def _autocast(x: Tensor) -> Tensor:
    """`x` as autocast would cast it, once: left to itself autocast casts, and keeps, a copy for each product."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.is_floating_point() and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
