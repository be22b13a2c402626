"""The matrix W + s·B A: added, formed and measured.

    ΔW = s·B A (Hu et al. 2021, section 4.1)     W (out, in) frozen, A (r, in), B (out, r), s = α/r or α/√r

The products of a layer need no such matrix (`linear.py`). Merging does (`add_product`), and so does code that looks at
ΔW (`dense_update`). A layer that many rows pass through is faster with it (`summed`, if `forms` and `forming_pays` are
true). DoRA needs the norm of each of its rows, which takes only thin products (`row_norm`).

For W (1536, 576) and r = 16: ΔW has 1536 · 576 = 884,736 numbers; A and B have 16 · 576 + 1536 · 16 = 33,792.

Precision: a sum that is stored as a weight is computed in float32 at least, and rounded once. These functions hold no
state. Not here: how a convolution's or an embedding's weight is seen as a matrix. Its layer defines that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import product_dtype

_BLOCK = 1 << 19  # bytes in the blocks of `add_product`

Blocks = tuple[tuple[int, int], ...]  # (size, rank) of each block of a fused output: q, k and v in one weight


def precise(tensor: Tensor) -> Tensor:
    """`tensor` in float32, or unchanged if it is float32 or float64."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def dense_update(A: Tensor, B: Tensor) -> Tensor:
    """B A, the matrix (out, in) that the two factors stand for, in float32 at least; the scale is left out.

    Trailing dimensions of a convolution's factors are flattened: A (r, in, *k), B (out, r, 1, …) → (out, in·∏k).
    """
    return precise(B).flatten(1) @ precise(A).flatten(1)


@torch.no_grad()
def add_product(total: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> None:
    """total ← W + s·B A, summed in float32 at least and rounded once.

    total, weight (…, out, in), with any strides; A (…, r, in); B (…, out, r). The sum is made in blocks that fit into a
    processor's cache, so neither B A nor a float32 copy of the weight is ever held whole.
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


def summed(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """W + s·B A for the products of one pass, in the dtype that all three share.

    A convolution's tensors are read as matrices, and the sum is laid out as its kernel (out, in, *k).
    """
    return torch.addmm(weight.flatten(1), B.flatten(1), A.flatten(1), alpha=scale).view(weight.shape)


def forms(x: Tensor, weight: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether W + s·B A may be formed in the precision of these tensors.

    Never in half precision: an update smaller than the weight's last digit vanishes when the sum is rounded.
    """
    dtype = product_dtype(x)
    return dtype == weight.dtype == A.dtype == B.dtype and dtype in (torch.float32, torch.float64)


def forming_pays(rows: int, weight: Tensor, factor: int) -> bool:
    """Whether forming W + s·B A once for each pass is less work than two thin products over all rows of x.

    It takes fewer operations from T = 2·in·out/(in + out) rows on: 2·r·in·out operations twice, against
    2·T·r·(in + out). `factor` times as many rows are required, because adding matrices is limited by memory.
    """
    outputs = len(weight)
    inputs = weight.numel() // max(outputs, 1)
    return rows * (inputs + outputs) >= factor * 2 * inputs * outputs


def block_diagonal(B: Tensor, blocks: Blocks) -> Tensor:
    """B of a fused layer as one matrix: B (Σ sizeᵢ, max r), the rows of the blocks with a rank → (Σ size, Σ rᵢ).

    Block i takes the next rᵢ columns. All other elements are zero, and so are the rows of a block of rank 0.

    Example: blocks ((4, 2), (4, 0), (4, 1)) give q rank 2, k no update and v rank 1. B (8, 2) holds 4 rows of q and 4
    of v. It becomes (12, 3): q's rows fill the columns 0 and 1, k's rows are zero, v's rows fill the column 2.
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
    """‖W + s·B A‖ of each output row (out,), without forming B A: DoRA's norm (Liu et al. 2024, eq. 5).

    ‖w + s·bA‖² = ‖w‖² + 2s·b·(A wᵀ) + s²·b (A Aᵀ) bᵀ  for a row w of W and b of B: all products are thin.

    weight (out, in), with any strides; A (r, in); B (out, r). Sums are in float32 at least. The product with a weight
    of lower precision is computed in that precision, so that the weight is not copied.
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
    """g = m / ‖W + s·B A‖     magnitude, norm (out,) → (out,)     Liu et al. 2024, eq. 5

    The gradient treats the norm as a constant, so the norm needs no backward pass (section 4.3).
    """
    norm = norm.detach()
    return magnitude / norm.clamp_min(torch.finfo(norm.dtype).tiny)
