"""W + s·ΔW written out in float64, one index at a time where that is clearer: what the layers are tested against.

Nothing here imports lorakit.
"""

import math

import torch
from torch import Tensor


def linear_weight(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor | None = None) -> Tensor:
    """W (out, in), A (r, in), B (out, r) → the adapted weight (out, in); with DoRA's magnitude (out)."""
    total = W + scale * torch.einsum("or,ri->oi", B, A)
    if magnitude is None:
        return total
    norms = torch.stack([row.pow(2).sum().sqrt() for row in total]).detach()
    return (magnitude / norms)[:, None] * total


def merged_linear_weight(W: Tensor, A: Tensor, B: Tensor, scale: float, blocks: list[tuple[int, int]]) -> Tensor:
    """Blocks of rows of W (out, in), of the sizes and ranks given: each takes the next rows of B and of A."""
    parts, row, b, a = [], 0, 0, 0
    for size, rank in blocks:
        part = W[row : row + size]
        if rank:
            part = part + scale * B[b : b + size, :rank] @ A[a : a + rank]
            b, a = b + size, a + rank
        parts.append(part)
        row += size
    return torch.cat(parts)


def embedding_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W (vocabulary, dim), A (r, vocabulary), B (dim, r)."""
    return W + scale * torch.einsum("dr,rv->vd", B, A)


def conv_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Factored: W (out, in/groups, *k), A (r, in/groups, *k), B (out, r, 1, …)."""
    return W + scale * torch.einsum("or,r...->o...", B.reshape(B.shape[0], -1), A)


def loralib_conv_weight(W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """loralib's: the product of the two matrices read in the order of the kernel's memory."""
    product = B @ A
    assert product.numel() == math.prod(W.shape)
    return W + scale * product.reshape(-1).reshape(W.shape)
