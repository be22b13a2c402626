"""The layouts of an update: the shapes of its two factors, and what they multiply to.

    Matrix          A (r, in)                 B (out, r)                 ΔW = B A
    Blocks          A (Σ rᵢ, in)              B (Σ sizeᵢ, max r)         block i: B[rows i, :rᵢ] A[rows i]
    Lookup           A (r, vocabulary)         B (dim, r)                 ΔW = (B A)ᵀ, whose rows are looked up
    Kernel          A (r, in/groups, *k)      B (out, r, 1, …)           ΔW = B A viewed as a kernel
    LoralibKernel   A (r·k_last, in·k_last)   B (out/groups·∏k[:-1], r·k_last)
    Stack           A (experts, r, in)        B (experts, out, r)        a matrix for each expert

A layout is plain data. It says everything about the factors that does not need a layer: which dimension the rank runs
along, which matrices are inside, and the same update as one pair of thin layers, as most files hold it. A layer kind
names its layout (`AdaptedLayer.layout`). A kind whose factors are laid out in another way subclasses `Layout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .errors import LoraError
from .matrix import Blocks as BlockSizes
from .matrix import block_diagonal

Factors = tuple[Tensor, Tensor]
Stored = Literal["out-in", "in-out", "is_transposed", "", "?"]  # how a stack's weight is stored, see `Stack`


@dataclass(frozen=True)
class Layout:
    """The layout of A and B. This class fits any pair in which the rank is the first dimension of A and second of B."""

    name: ClassVar[str] = "matrix"
    rank_dim: ClassVar[int] = 0  # the dimension of A that the rank runs along; in B it is the next one
    of_loralib: ClassVar[bool] = False  # whether loralib has a layer with these factors

    def rank_of(self, A: Tensor, B: Tensor) -> int:
        """r, read from the factors alone."""
        return A.shape[self.rank_dim]

    def holds(self, other: Layout) -> bool:
        """Whether factors of the other layout mean the same in this one."""
        return other == self

    def simplest(self, A: Tensor, B: Tensor) -> tuple[Layout, Tensor, Tensor]:
        """The same ΔW in a layout whose updates can be added by stacking A and B along the rank."""
        return self, A, B

    def pair(self, A: Tensor, B: Tensor) -> tuple[Layout, Tensor, Tensor]:
        """The same ΔW as A (R, …) and B (…, R, …) of two thin layers, one after the other.

        Raises LoraError where no such pair has the same ΔW.
        """
        return self.simplest(A, B)

    def stacked(self, parts: Sequence[Factors]) -> Factors:
        """The sum of updates in this layout, which must be a `simplest` one: A = [A₁; A₂; …] and B = [B₁, B₂, …]."""
        return torch.cat([A for A, _ in parts], self.rank_dim), torch.cat([B for _, B in parts], self.rank_dim + 1)

    def matrices(self, A: Tensor, B: Tensor) -> dict[str, Factors]:
        """A (r, in) and B (out, r) of each matrix in the update, by the suffix of the matrix's name."""
        _, A, B = self.simplest(A, B)
        return {"": (A.flatten(1), B.flatten(1))}


@dataclass(frozen=True)
class Matrix(Layout):
    """The layout for a linear layer."""

    name = "linear"
    of_loralib = True


@dataclass(frozen=True)
class Blocks(Layout):
    """The layout for a linear layer whose output comes in blocks (q, k and v). Each block has its own rank or none."""

    name = "merged_linear"
    of_loralib = True

    sizes: BlockSizes = ()  # (size, rank) of each block of the output

    def shapes(self, inputs: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of A and B."""
        ranks = [rank for _, rank in self.sizes]
        return (sum(ranks), inputs), (sum(size for size, rank in self.sizes if rank), max(ranks))

    def rank_of(self, A: Tensor, B: Tensor) -> int:
        return B.shape[1]

    def simplest(self, A: Tensor, B: Tensor) -> tuple[Layout, Tensor, Tensor]:
        return Matrix(), A, block_diagonal(B, self.sizes)


@dataclass(frozen=True)
class Lookup(Layout):
    """The layout for an embedding."""

    name = "embedding"
    of_loralib = True


@dataclass(frozen=True)
class Kernel(Layout):
    """The layout for a convolution: one to r channels, then one with kernel size 1. All groups share A."""

    name = "conv"

    groups: int = 1

    def pair(self, A: Tensor, B: Tensor) -> tuple[Layout, Tensor, Tensor]:
        """With groups, A (groups·r, in, *k) holds a copy of A for the channels of each group, along the diagonal."""
        if self.groups == 1:
            return self, A, B
        rank, channels, *kernel = A.shape
        full = A.new_zeros(self.groups, rank, self.groups, channels, *kernel)
        for group in range(self.groups):
            full[group, :, group] = A
        return self, full.view(self.groups * rank, self.groups * channels, *kernel), B


@dataclass(frozen=True)
class LoralibKernel(Layout):
    """The layout for a convolution made by loralib's constructors: B A is viewed as the kernel, whose rank differs."""

    name = "conv_loralib"
    of_loralib = True

    kernel_last: int = 1

    def rank_of(self, A: Tensor, B: Tensor) -> int:
        return A.shape[0] // self.kernel_last

    def pair(self, A: Tensor, B: Tensor) -> tuple[Layout, Tensor, Tensor]:
        raise LoraError(
            "a convolution made by loralib's constructor has another rank than PEFT's (r times the kernel size) and "
            "cannot be written exactly. Save it as a .pt file, or use attach() on a plain convolution."
        )


@dataclass(frozen=True)
class Stack(Layout):
    """The layout for a stack of experts' matrices. A and B are always such that the update gives x Aᵀ Bᵀ.

    stored says how the weight is stored, or what a file without a model tells:

    out-in           (experts, out, in), as nn.Linear stores its weight
    in-out           (experts, in, out), and only the shapes tell (Llama 4)
    is_transposed    (experts, in, out), and the module has a true `is_transposed`, transformers' attribute (GPT-OSS)
    (empty)          read from a file without a model: A and B are as PEFT has written them since 0.19.1, which treats
                     "in-out" as "out-in"
    ?                read from a file without a model: A and B are the factors of ΔW or of ΔWᵀ
    """

    name = "experts"
    rank_dim = 1

    stored: Stored = ""

    def holds(self, other: Layout) -> bool:
        if not isinstance(other, Stack):
            return False
        both = {self.stored, other.stored}
        return "?" not in both and both != {"", "in-out"}

    def pair(self, A: Tensor, B: Tensor) -> tuple[Layout, Tensor, Tensor]:
        raise LoraError(f"an update of {len(A)} experts' matrices cannot be written as a pair of layers.")

    def matrices(self, A: Tensor, B: Tensor) -> dict[str, Factors]:
        return {f"[{expert}]": own for expert, own in enumerate(zip(A, B, strict=True))}
