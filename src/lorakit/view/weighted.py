"""PEFT's weighted sums of adapters: "cat" is the sum itself, "svd" the nearest one of a lower rank.

    cat    ΔW = Σ wᵢ·sᵢ·BᵢAᵢ, of rank Σ rᵢ (`core/combine.py`)
    svd    the r largest singular values of that ΔW, and their vectors; no matrix of rank r is nearer (Eckart, Young)

With B = Q₁R₁ and Aᵀ = Q₂R₂ the singular values are those of R₁R₂ᵀ, a matrix as small as the rank of the sum. Not here:
the types that add the A's and the B's, and so have products of one adapter's A with another's B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..core.adapter import Adapter, Update
from ..core.combine import combine
from ..core.errors import LoraError
from ..core.layouts import Stack

TYPES = ("cat", "svd")


def weighted_sum(adapters: Sequence[Adapter], weights: Sequence[float], kind: str, rank: int | None) -> Adapter:
    """The sum of the adapters' updates with these weights. rank: for "svd"; by default the largest of the adapters.

    Raises LoraError for other kinds of sums, and what `combine` raises.
    """
    if kind not in TYPES:
        raise LoraError(
            f"combination_type={kind!r}: expected 'cat', which is exact and has the sum of the ranks, or 'svd'. The "
            "others mix the factors of different adapters."
        )
    total = combine(adapters, weights)
    if kind == "cat":
        return total
    most = rank or max(update.rank for adapter in adapters for update in adapter.updates.values())
    return dataclasses.replace(total, updates={name: truncated(name, own, most) for name, own in total.updates.items()})


def truncated(name: str, update: Update, rank: int) -> Update:
    """The update of at most this rank that is nearest to this one."""
    A, B = update.A.flatten(1).double(), update.B.flatten(1).double()
    if isinstance(update.layout, Stack) or B.shape[1] != len(A):
        raise LoraError(f"{name}: a {update.kind} update is not one product of two matrices. Use 'cat'.")
    if update.rank <= rank:
        return update
    left, small_B = torch.linalg.qr(B)
    right, small_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(small_B @ small_A.mT)
    rank = min(rank, len(S))
    new_A, new_B = (Vh @ right.mT)[:rank], left @ (U[:, :rank] * (update.scale * S[:rank]))
    return dataclasses.replace(
        update,
        A=new_A.to(update.A.dtype).view(rank, *update.A.shape[1:]),
        B=new_B.to(update.B.dtype).view(len(B), rank, *update.B.shape[2:]),
        rank=rank,
        alpha=float(rank),
    )
