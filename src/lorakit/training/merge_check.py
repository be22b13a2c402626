"""Rows of a merged weight as they lie in the file, against the equation written out in float64.

    w' = w + s · b A                       LoRA (Hu et al. 2021, eq. 3)
    w' = m / ‖w + s · b A‖ · (w + s · b A)      DoRA (Liu et al. 2024, eq. 5)

The base's rows, the merged ones and the factors are read anew, and nothing that merged them computes here. A stored
row is a row w of the matrix; where the weight is stored transposed (GPT-2's Conv1D, an embedding) it is a column, and
b A is a column of ΔW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.adapter import TokenRows, Update
from ..core.errors import LoraError
from ..core.layouts import LoralibKernel, Stack

ROWS = 8  # of each tensor, evenly from the first to the last
_BLOCK = 256  # rows that are read at once where all are needed
# The sum is made in float32 (float64 for a base in float64) before it is rounded, DoRA's norm over a row of it.
_SUM = 64

Rows = Callable[[int, int], Tensor]  # (first, count) → rows of a stored weight


def check_token_rows(name: str, rows: TokenRows, length: int, before: Rows, after: Rows) -> None:
    """Raise LoraError unless the trained rows of a token table are in the file, and the base's beside them."""
    for token, value in zip(rows.tokens, rows.values, strict=True):
        if not torch.equal(after(token, 1)[0], value.to(after(token, 1).dtype)):
            raise LoraError(f"{name}: row {token} is not the one that was trained. Nothing was put in place.")
    for row in _spread(length):
        if row not in rows.tokens and not torch.equal(after(row, 1), before(row, 1)):
            raise LoraError(f"{name}: row {row} is not the base's. Nothing was put in place.")


def _spread(length: int) -> list[int]:
    """Some rows of so many."""
    return sorted({round(i * (length - 1) / max(ROWS - 1, 1)) for i in range(ROWS)})


@dataclass(frozen=True)
class Weight:
    """A merged weight. shape: as it is stored. transposed: (in, out). part: which expert of the update it is of."""

    name: str
    update: Update
    shape: tuple[int, ...]
    transposed: bool
    part: int | None

    def check(self, before: Rows, after: Rows) -> bool:
        """Whether any of the rows looked at differs from the base's.

        Raises LoraError where a row is not what base and adapter say, beyond the rounding of its dtype.
        """
        moved = False
        gains = self._gains(before)
        for row in _spread(self.shape[0]):
            base, found = before(row, 1), after(row, 1)
            expected, bound = self._sum(base, row)
            if self.update.magnitude is not None:
                gain = gains
                if gain is None:
                    gain = (self.update.magnitude[row].double() / expected.norm()).view(1, 1)
                expected, bound = expected * gain, bound * gain.abs()
            exact = torch.float64 if found.dtype == torch.float64 else torch.float32
            rounding = torch.finfo(found.dtype).eps + _SUM * torch.finfo(exact).eps
            smallest = torch.finfo(found.dtype).smallest_normal
            off = (found.reshape(1, -1).double() - expected).abs() > rounding * bound + smallest
            if off.any() or not found.isfinite().all():
                raise LoraError(
                    f"{self.name}: {int(off.sum())} of {off.numel()} numbers in row {row} are not base + adapter. "
                    "Nothing was put in place."
                )
            moved = moved or not torch.equal(found, base)
        return moved

    def _sum(self, rows: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """w + s · b A of these rows (k, …) as a matrix (k, n), and the same of absolute values."""
        weight, scale = rows.reshape(len(rows), -1).double(), self.update.scale
        own = slice(first, first + len(rows))
        if isinstance(self.update.layout, LoralibKernel):
            A, B = self.update.A.double(), self.update.B.double()
            delta = (B @ A).view(self.shape)[own].reshape(weight.shape)
            return weight + scale * delta, weight.abs() + abs(scale) * delta.abs()
        if isinstance(self.update.layout, Stack) and self.part is None:  # a row is an expert's whole matrix
            experts = range(own.start, own.stop)
            products = [(left @ right, left.abs() @ right.abs()) for left, right in map(self._factors, experts)]
            delta, bound = (torch.stack(own).reshape(weight.shape) for own in zip(*products, strict=True))
        else:
            left, right = self._factors(self.part)
            delta, bound = left[own] @ right, left[own].abs() @ right.abs()
        return weight + scale * delta, weight.abs() + abs(scale) * bound

    def _factors(self, part: int | None) -> tuple[Tensor, Tensor]:
        """Two matrices whose product is ΔW, of one expert, as it is stored."""
        matrices = self.update.layout.matrices(self.update.A, self.update.B)
        A, B = (factor.double() for factor in matrices["" if part is None else f"[{part}]"])
        return (A.T, B.T) if self.transposed else (B, A)

    def _gains(self, before: Rows) -> Tensor | None:
        """DoRA's m / ‖W + s·B A‖ for all columns of a weight that is stored transposed."""
        if self.update.magnitude is None or not self.transposed:
            return None
        squares = torch.zeros((), dtype=torch.float64)
        for first in range(0, self.shape[0], _BLOCK):
            block, _ = self._sum(before(first, min(_BLOCK, self.shape[0] - first)), first)
            squares = squares + block.square().sum(0)
        return self.update.magnitude.double() / squares.sqrt()
