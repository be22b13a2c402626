"""Several linear layers in one weight: q, k and v, each with its own update or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import layouts
from ..adapted import AdaptedLayer
from ..errors import LoraError
from ..layouts import Layout
from ..matrix import Blocks, block_diagonal
from .linear import Linear

_NONE_ENABLED: Sequence[bool] = (False,)  # loralib's default


class MergedLinear(Linear):
    """Several linear layers in one weight (q, k and v), each of them with its own update or none.

    enable_lora: a flag for each block of the output. If it is left out, and splits or several ranks are given, all
    blocks are enabled. splits: the sizes of the blocks, by default equal. r: the rank, or a rank for each block (0 for
    none).

    A (Σ rᵢ, in), B (Σ sizeᵢ, max r), sums over the blocks with an update: the update of block i is the product of the
    first rᵢ columns of its rows of B and its own rᵢ rows of A. The scale is lora_alpha / max r for all of them.

    That is a `Linear` whose B is block-diagonal, (out, Σ rᵢ), with zero rows for the blocks left out. It is computed as
    one.
    """

    blocks: Blocks
    enable_lora: Sequence[bool]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int | Sequence[int] = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        enable_lora: Sequence[bool] = _NONE_ENABLED,
        fan_in_fan_out: bool = False,
        merge_weights: bool = True,
        *,
        splits: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        blocks = block_sizes(out_features, r, enable_lora, splits)
        rank = max(rank for _, rank in blocks)
        self.set_blocks(blocks, None if enable_lora is _NONE_ENABLED and rank else enable_lora)
        super().__init__(
            in_features, out_features, rank, lora_alpha, lora_dropout, fan_in_fan_out, merge_weights, **kwargs
        )

    @property
    def layout(self) -> Layout:
        return layouts.Blocks(self.blocks)

    def adopted(self, plain: type[nn.Module], layout: Layout) -> None:
        super().adopted(plain, layout)
        assert isinstance(layout, layouts.Blocks)
        self.set_blocks(layout.sizes)

    def set_blocks(self, blocks: Blocks, enable_lora: Sequence[bool] | None = None) -> None:
        """Set the blocks, before there are factors. enable_lora: the flags as they were given."""
        self.blocks = blocks
        self.enable_lora = [rank > 0 for _, rank in blocks] if enable_lora is None else enable_lora

    @property
    def splits(self) -> list[int]:
        """The sizes of the blocks."""
        return [size for size, _ in self.blocks]

    @property
    def lora_ind(self) -> Tensor:
        """Which rows of the weight have an update: bool (out,)."""
        sizes = torch.tensor(self.splits, device=self.weight.device)
        enabled = torch.tensor([rank > 0 for _, rank in self.blocks], device=self.weight.device)
        # The size is given because tensors on "meta" have no values to add up.
        return enabled.repeat_interleave(sizes, output_size=sum(self.splits))

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return layouts.Blocks(self.blocks).shapes(self.in_features)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_A, block_diagonal(self.lora_B, self.blocks)

    def resized(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        return AdaptedLayer.resized(self, outputs, inputs)  # it is unknown to which block new rows belong

    def zero_pad(self, x: Tensor) -> Tensor:
        """The rows x of the enabled blocks, put in their places among zero rows: (out, …)."""
        enabled = self.lora_ind
        padded = x.new_zeros((len(enabled), *x.shape[1:]))
        padded[enabled] = x
        return padded

    def merge_AB(self) -> Tensor:
        """loralib's name for `delta()`."""
        return self.delta()


def block_sizes(
    out_features: int,
    r: int | Sequence[int],
    enable_lora: Sequence[bool] = _NONE_ENABLED,
    splits: Sequence[int] | None = None,
) -> Blocks:
    """(size, rank) of each block of the output of a `MergedLinear`, rank 0 where there is no update.

    Raises LoraError if the arguments do not agree.
    """
    given = f"out_features={out_features}, r={r}, enable_lora={enable_lora}, splits={splits}"
    if enable_lora is _NONE_ENABLED and (splits is not None or isinstance(r, Sequence)):
        enable_lora = [True] * len(r if isinstance(r, Sequence) else splits or ())
    ranks = list(r) if isinstance(r, Sequence) else [r] * len(enable_lora)
    if splits is None:
        if out_features % len(enable_lora):
            raise LoraError(f"{given}: the output is not a multiple of {len(enable_lora)} equal blocks; give splits.")
        splits = [out_features // len(enable_lora)] * len(enable_lora)
    if not len(splits) == len(ranks) == len(enable_lora) or sum(splits) != out_features or min(*splits, *ranks) < 0:
        raise LoraError(
            f"{given}: expected a rank and a flag for each of the {len(splits)} blocks, and sizes that sum to "
            f"{out_features}."
        )
    return tuple((size, rank if enabled else 0) for size, rank, enabled in zip(splits, ranks, enable_lora, strict=True))
