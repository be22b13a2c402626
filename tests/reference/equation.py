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


def merged_linear_weight(W: Tensor, A: Tensor, B: Tensor, scale: float, enabled: list[bool], rank: int) -> Tensor:
    """Blocks of rows of W (out, in): the i-th enabled one gets B's i-th block of rows times A's i-th r rows."""
    block = W.shape[0] // len(enabled)
    rows, used = [], 0
    for index, flag in enumerate(enabled):
        part = W[index * block : (index + 1) * block]
        if flag:
            part = part + scale * B[used * block : (used + 1) * block] @ A[used * rank : (used + 1) * rank]
            used += 1
        rows.append(part)
    return torch.cat(rows)


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
