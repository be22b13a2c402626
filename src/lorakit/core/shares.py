"""What each target gets by the settings: its rank, its alpha and the blocks of its output.

All of it is checked here, before a model is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import layouts
from .adapted import AdaptedLayer
from .errors import LoraError
from .init import looks_at_weight, random_inits
from .kinds import layer_class
from .layers import block_sizes, plain_matrix
from .layouts import Layout
from .matrix import Blocks
from .settings import LoRASettings, check_scale
from .targets import Selection, Target, pattern_values


@dataclass(frozen=True)
class Share:
    """What one target gets. layout: None for the layer kind's own."""

    rank: int
    alpha: float
    layout: Layout | None = None


def shares_of(settings: LoRASettings, selection: Selection) -> dict[str, Share]:
    """The share of each target, by name. Raises LoraError for settings that a target cannot have."""
    names = list(selection.targets)
    ranks = pattern_values(settings.rank_pattern, names, "rank_pattern")
    alphas = pattern_values(settings.alpha_pattern, names, "alpha_pattern")
    sizes = pattern_values(settings.splits, names, "splits")
    needs_weight = settings.dora or looks_at_weight(settings.init)
    found = {}
    for name, target in selection.targets.items():
        rank = ranks.get(name, settings.rank)
        layout = None
        if name in sizes or isinstance(rank, Sequence):
            blocks = _blocks(name, target, rank, sizes.get(name))
            layout, rank = layouts.Blocks(blocks), max(own for _, own in blocks)
        assert isinstance(rank, int)
        if needs_weight and layout is not None:
            raise LoraError(
                f"{name!r} is adapted in blocks, where dora and the init {settings.init!r} have no meaning: they take "
                f"the whole weight. Use dora=False and one of the inits {random_inits()}."
            )
        _check_target(name, target, settings, needs_weight)
        alpha = alphas.get(name, settings.alpha)
        check_scale(rank, alpha)
        if looks_at_weight(settings.init):
            limit = min(target.weight.flatten(1).shape)
            if rank > limit:
                raise LoraError(
                    f"{name!r} has a weight of rank {limit} at most: init={settings.init!r} cannot take rank={rank}."
                )
        found[name] = Share(rank, alpha, layout)
    return found


def _check_target(name: str, target: Target, settings: LoRASettings, needs_weight: bool) -> None:
    """Refuse settings that have no meaning for a parameter that is read, or for a layer whose weight is not at hand."""
    kind = type(target.module).__name__
    if target.parameter:
        what = f"{name!r} is a weight that {kind} or its parent reads"
        if settings.dropout > 0:
            raise LoraError(
                f"{what}, so its update has no input to drop: use dropout=0, or leave it out of the targets."
            )
        if target.weight.dim() == 3 and needs_weight:
            raise LoraError(
                f"{what}, with a matrix for each expert: use dora=False and one of the inits {random_inits()}."
            )
    elif needs_weight and not (layer_class(target.module) or AdaptedLayer).takes_weight:
        raise LoraError(
            f"{name!r} is a {kind}, which computes output or weight in its own way: dora and the inits that take "
            f"factors from the weight need the weight itself. Use dora=False and one of the inits {random_inits()}, or "
            "leave it out of the targets."
        )


def _blocks(name: str, target: Target, rank: int | Sequence[int], sizes: Sequence[int] | None) -> Blocks:
    """(size, rank) of each block of a fused linear layer's output."""
    module = target.module
    if target.class_for(layouts.Blocks()) is None:
        kind = "parameter" if target.parameter else type(module).__name__
        raise LoraError(f"{name!r} is a {kind}: only the output of a linear layer comes in blocks.")
    try:
        blocks = block_sizes(len(plain_matrix(module)), rank, splits=sizes)
    except ValueError as error:
        raise LoraError(f"{name!r}: {error}") from None
    if not any(own for _, own in blocks):
        raise LoraError(f"{name!r}: every block has rank 0; leave the module out of the targets.")
    return blocks
