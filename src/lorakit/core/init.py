"""How the factors A and B start. Each init leaves the model unchanged: ΔW is zero, up to rounding with the last two.

    kaiming    A ~ U(±1/√in), B = 0                 Hu et al. 2021, as loralib and PEFT draw it
    gaussian   A ~ N(0, 1/r²), B = 0                the paper's own words; PEFT's "gaussian"
    pissa      s·B₀A₀ = the r largest singular directions of W        Meng et al. 2024, eq. 2-4
    olora      B₀A₀ = the first r columns of Q times rows of R, W = QR        Büyükakyüz 2024

The last two move a part of W into the factors. Their papers subtract that part from the stored weight; lorakit keeps
the weight untouched and subtracts it in the update instead, ΔW = s·(B A − B₀ A₀), which is the same function without
a second, rounded copy of the base model. A₀ and B₀ are kept beside A and B (see `AdaptedLayer.factors`).

`add_init` adds an init under a new name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import LoraError
from .matrix import precise

Draw = Callable[[Tensor, Tensor, bool], None]
Take = Callable[[Tensor, int, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Init:
    """How A and B start: exactly one of `draw` and `take` is given.

    draw(A, B, lookup)            fills A (r, in, …) and B (out, r, …) in place so that B A = 0. lookup: the layer
                                  reads columns of A by token, as an embedding does.
    take(matrix, rank, scale)     A₀ (rank, in) and B₀ (out, rank), a part of the weight's matrix (out, in).
    """

    draw: Draw | None = None
    take: Take | None = None


def add_init(name: str, *, draw: Draw | None = None, take: Take | None = None) -> None:
    """Make `attach(model, init=name)` start A and B in this way, see `Init`.

    Raises LoraError unless exactly one of draw and take is given.
    """
    if (draw is None) == (take is None):
        raise LoraError(f"add_init({name!r}): give draw or take, one of them.")
    _inits[name] = Init(draw, take)


def init_of(name: str) -> Init:
    """The init of this name. Raises LoraError for an unknown name."""
    if name not in _inits:
        raise LoraError(f"init={name!r}: expected one of {', '.join(map(repr, _inits))}.")
    return _inits[name]


def looks_at_weight(name: str) -> bool:
    """Whether the init takes the factors from the weight."""
    return init_of(name).take is not None


def random_inits() -> str:
    """The names of the inits that do not, for an error."""
    return ", ".join(repr(name) for name, init in _inits.items() if init.draw is not None)


# --- drawn at random -------------------------------------------------------------------------------------------------


def kaiming(A: Tensor, B: Tensor, lookup: bool) -> None:
    """For an embedding A is zero, not B (as in loralib), so a token that never occurs keeps its row exactly."""
    if lookup:
        nn.init.normal_(B)
        nn.init.zeros_(A)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)


def gaussian(A: Tensor, B: Tensor, lookup: bool) -> None:
    drawn, zero = (B, A) if lookup else (A, B)
    nn.init.normal_(drawn, std=1 / A.shape[0])
    nn.init.zeros_(zero)


# --- taken from the weight -------------------------------------------------------------------------------------------


@torch.no_grad()
def pissa(matrix: Tensor, rank: int, scale: float, *, exact: bool = False) -> tuple[Tensor, Tensor]:
    """A₀ (rank, in) and B₀ (out, rank) such that s·B₀A₀ is the best approximation of W (out, in) of that rank.

    Computed in float32 at least. exact: by the whole SVD, which takes longer and draws no random numbers.
    """
    matrix = precise(matrix)
    if exact:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        root = (S[:rank] / scale).sqrt()
        return root[:, None] * Vh[:rank], U[:, :rank] * root
    # Randomised SVD (Halko et al. 2011): a few more directions than asked for, sharpened by power iterations.
    directions = min(rank + 16, *matrix.shape)
    U, S, V = torch.svd_lowrank(matrix, q=directions, niter=16)
    root = (S[:rank] / scale).sqrt()
    return (V[:, :rank] * root).T.contiguous(), U[:, :rank] * root


@torch.no_grad()
def olora(matrix: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A₀ = the first rows of R and B₀ = the first columns of Q, W = Q R, in float32 at least."""
    Q, R = torch.linalg.qr(precise(matrix))
    return R[:rank].contiguous(), Q[:, :rank].contiguous()


_inits: dict[str, Init] = {
    "kaiming": Init(draw=kaiming),
    "gaussian": Init(draw=gaussian),
    "pissa": Init(take=pissa),
    "olora": Init(take=olora),
}
