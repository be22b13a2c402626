"""Combining adapters: one adapter whose update is a weighted sum of others'."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .adapter import Adapter, Update
from .errors import LoraError


def combine(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The adapter with ΔW = Σ wᵢ·sᵢ·ΔWᵢ in every module. It is exact, its rank is the sum of the ranks, and weights may
    have any sign.

    A = [A₁; A₂; …] and B = [w₁s₁B₁, w₂s₂B₂, …], with scale 1. Stacking has no cross terms, which adding the A's and the
    B's would have. A module that an adapter leaves alone counts as zero. Blocks of a fused projection become one
    update.

    Raises LoraError for DoRA, whose magnitudes do not add up, for updates of one module that differ in kind, and for
    tensors trained whole and rows of token tables that are not the same in all adapters.
    """
    if not adapters or len(adapters) != len(weights):
        raise LoraError(f"combine: {len(adapters)} adapters and {len(weights)} weights; expected one for each.")
    parts: dict[str, list[tuple[Update, float]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, update in adapter.updates.items():
            parts.setdefault(name, []).append((update, weight))
    updates = {name: _sum(name, own) for name, own in parts.items()}
    first = adapters[0]
    for name in sorted({name for adapter in adapters for name in adapter.token_rows}):
        rows = [adapter.token_rows.get(name) for adapter in adapters]
        if any(own is None or not own.equals(rows[0]) for own in rows):
            raise LoraError(f"rows of {name} were trained and are not the same in all adapters: they have no sum.")
    for name in sorted({name for adapter in adapters for name in adapter.trained}):
        values = [adapter.trained.get(name) for adapter in adapters]
        if any(value is None or values[0] is None or not torch.equal(value, values[0]) for value in values):
            raise LoraError(f"{name} was trained whole and is not the same in all adapters: it has no sum.")
    targets = tuple(sorted({target for adapter in adapters for target in adapter.targets}))
    return dataclasses.replace(first, updates=updates, targets=targets, dropout=0.0)


def _sum(name: str, parts: list[tuple[Update, float]]) -> Update:
    plain = [(update.simplest(), weight) for update, weight in parts]
    first = plain[0][0]
    for update, _ in plain:
        if update.magnitude is not None:
            raise LoraError(f"{name} is a DoRA update: its magnitudes do not add up. Merge the model instead.")
        if not first.layout.holds(update.layout):
            raise LoraError(f"{name}: a {update.kind} update cannot be added to a {first.kind} one.")
    A, B = first.layout.stacked([(update.A, weight * update.scale * update.B) for update, weight in plain])
    rank = sum(update.rank for update, _ in plain)
    return dataclasses.replace(first, A=A, B=B, rank=rank, alpha=float(rank), rslora=False)
