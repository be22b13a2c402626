"""How the factors A and B begin. Each starts the model where it was: ΔW is zero, with the last two up to rounding.

    kaiming    A ~ U(±1/√in), B = 0                 Hu et al. 2021, as loralib and PEFT draw it
    gaussian   A ~ N(0, 1/r²), B = 0                the paper's own words; PEFT's "gaussian"
    pissa      s·B₀A₀ = the r largest singular directions of W        Meng et al. 2024, eq. 2-4
    olora      B₀A₀ = the first r columns of Q times rows of R, W = QR        Büyükakyüz 2024

The last two move a part of W into the factors. Their papers subtract that part from the stored weight; lorakit keeps
the weight untouched and subtracts it in the update instead, ΔW = s·(B A − B₀ A₀), which is the same function without
a second, rounded copy of the base model. A₀ and B₀ are kept beside A and B (see `AdaptedLayer.factors`).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .matrix import precise

Init = Literal["kaiming", "gaussian", "pissa", "olora"]
INITS: tuple[str, ...] = get_args(Init)
RANDOM_INITS = ("kaiming", "gaussian")  # those that do not look at the weight


def random_factors(A: Tensor, B: Tensor, init: Init, *, embedding: bool = False) -> None:
    """Fill A (r, in, …) and B (out, r, …) in place so that B A = 0.

    An embedding reads columns of A by token, so there A is the zero one (as in loralib): a token that never occurs
    then keeps its row exactly.
    """
    drawn, zero = (B, A) if embedding else (A, B)
    rank = A.shape[0]
    if init == "gaussian":
        nn.init.normal_(drawn, std=1 / rank)
    elif embedding:
        nn.init.normal_(drawn)
    else:
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
    nn.init.zeros_(zero)


@torch.no_grad()
def factors_of_weight(
    matrix: Tensor, rank: int, scale: float, init: Init, *, exact: bool = False
) -> tuple[Tensor, Tensor]:
    """A₀ (rank, in), B₀ (out, rank) taken from the weight itself, for "pissa" and "olora".

    matrix (out, in), any strides. Computed in float32 at least. pissa: s·B₀A₀ is W's best approximation of that rank;
    exact: by the whole SVD, which takes longer and draws no random numbers.
    """
    matrix = precise(matrix)
    if init == "olora":
        Q, R = torch.linalg.qr(matrix)
        return R[:rank].contiguous(), Q[:, :rank].contiguous()
    if exact:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        root = (S[:rank] / scale).sqrt()
        return root[:, None] * Vh[:rank], U[:, :rank] * root
    # Randomised SVD (Halko et al. 2011): a few more directions than asked for, sharpened by power iterations.
    directions = min(rank + 16, *matrix.shape)
    U, S, V = torch.svd_lowrank(matrix, q=directions, niter=16)
    root = (S[:rank] / scale).sqrt()
    return (V[:, :rank] * root).T.contiguous(), U[:, :rank] * root
