"""An embedding and its low-rank update.

    y = W[tokens] + s · A[:, tokens]ᵀ Bᵀ          Hu et al. 2021, eq. 3, for a one-hot input

An embedding multiplies a one-hot row by its weight, which is a look-up. So A x is a look-up too: column t of A holds
the r numbers of token t. Only the columns of the input's tokens are read, and B A (dim, vocabulary) is never formed.

    tokens (4, 128)           4 sequences of 128 tokens
    W (49152, 576)            a row of 576 numbers for each of 49,152 words
    base (4, 128, 576)        W[tokens], which the layer has looked up
    A (16, 49152)             a column of r = 16 numbers for each word
    S = A[:, tokens] (16, 512)    512 columns, because 4 · 128 tokens are looked up
    B (576, 16)               each of 576 outputs is a combination of these 16 numbers
    y (4, 128, 576)

Dropout drops the update of a token as a whole, because only one element of its one-hot input is not zero.

Not here: `max_norm` (with it torch writes to the weight), sparse gradients of A, and the gain, by which the layer
multiplies.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import is_transformed, reshaped, without_autocast
from .dropout import Dropout


def plain_embedding(
    base: Tensor,
    tokens: Tensor,
    A: Tensor,
    B: Tensor,
    kept: Tensor | None,
    scale: float,
    padding_idx: int | None,
    by_frequency: bool,
) -> Tensor:
    """The equation, as torch's own operations. kept (…): dropout's mask over the tokens with its 1/(1 − p), or None."""
    S = F.embedding(tokens, A.T, padding_idx, scale_grad_by_freq=by_frequency)  # (…, r)
    S = S if kept is None else S * kept[..., None]
    return base + F.linear((S * scale).to(base.dtype), B.to(base.dtype))


class LoRAEmbedding(torch.autograd.Function):
    """The equation with its gradient written out. A d before a letter means the gradient with respect to it.

    y = base + s · Sᵀ Bᵀ,  S = m ⊙ A[:, tokens]       m (…): `kept`, or 1

    dbase = dy      dS = s · Bᵀ dyᵀ      dA[:, tokens] += m ⊙ dS      dB = (S dy)ᵀ

    padding_idx: a column of A without a gradient. by_frequency: a column's gradient is divided by its look-ups.
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
    """base + s · A[:, tokens]ᵀ Bᵀ: the update of an embedding is looked up and never formed.

    tokens (…)   base (…, dim) already looked up   A (r, vocabulary)   B (dim, r)   →   (…, dim)

    The padding column of A gets no gradient, so a padding row that starts without an update keeps none.
    scale_grad_by_freq is torch's: a column's gradient is divided by how often its token occurs in the batch.

    Kept for the backward pass: the tokens and, with dropout, a number for each. Source: Hu et al. 2021, eq. 3;
    loralib's Embedding.
    """
    kept = None if dropout is None else dropout(base.new_ones(tokens.shape))
    inputs: tuple[Any, ...] = (base, tokens, A, B, kept, scale, padding_idx, scale_grad_by_freq)
    if not is_transformed():
        y: Tensor = LoRAEmbedding.apply(*inputs)
        return y
    return plain_embedding(*inputs)


def _columns(A: Tensor, tokens: Tensor, kept: Tensor | None, dtype: torch.dtype) -> Tensor:
    """m ⊙ A[:, tokens]     tokens (T,) → (r, T)"""
    S = A.index_select(1, tokens).to(dtype)
    return S if kept is None else S * kept.reshape(-1).to(dtype)
