"""Stacks of experts' matrices in PEFT's files, whose layout PEFT has changed.

    A (experts·r, in), expert by expert        B (out, r·experts), whose columns run over the experts first

PEFT has written an update of a weight (experts, out, in) in this way since 0.19.1. Until 0.18.1 it took every such
weight for (experts, in, out), so A and B are those of ΔWᵀ: A (experts·r, out), B (in, r·experts). The shapes tell which
it is, unless the matrices are square. Then another stack of the same file tells, or the version of PEFT in the
configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from ..core.errors import LoraError
from ..core.host import Host
from .peft_config import PeftConfig

_LAST_BEFORE, _FIRST_AFTER = (0, 18, 1), (0, 19, 1)  # versions between changed the layout in steps


def stacked(A: Tensor, B: Tensor, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (experts, r, in) and B (experts, out, r), from the two tensors in a file."""
    return A.unflatten(0, (experts, rank)), B.unflatten(1, (rank, experts)).permute(2, 0, 1)


def flattened(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `stacked`."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


class StackLayout:
    """Which of the two layouts the stacks of one file have."""

    def __init__(self, config: PeftConfig, host: Host | None, stacks: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """stacks: the name in the model, A and B of each."""
        self.config, self.host = config, host
        told = {layout for stack in stacks if (layout := self._by_shape(*stack)) is not None}
        self.old_of_file = told.pop() if len(told) == 1 else self._by_version()

    def upright(self, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A (experts, r, in) and B (experts, out, r) in today's layout.

        Raises LoraError for a square matrix if nothing tells its layout.
        """
        if self.host is None or self.host.stack(name) is None or self.host.stored_transposed(name):
            return A, B  # nothing to compare with, or stored in the way that PEFT has always assumed
        old = self._by_shape(name, A, B)
        if old is None and A.shape[-1] == B.shape[-2]:
            old = self.old_of_file
            if old is None:
                raise LoraError(
                    f"{name}: its matrices are square, and PEFT {self.config.peft_version} is of the versions that "
                    "turned their layout: the file does not tell W from Wᵀ. Load it with the PEFT that wrote it, "
                    "save it again with PEFT 0.19.1 or later."
                )
        return (B.mT, A.mT) if old else (A, B)

    def _by_shape(self, name: str, A: Tensor, B: Tensor) -> bool | None:
        """True for the old layout, False for today's, None if the shapes fit both or neither."""
        shapes = None if self.host is None else self.host.stack(name)
        if self.host is None or shapes is None or self.host.stored_transposed(name):
            return None
        inputs, outputs = shapes[0][-1], shapes[1][-2]
        found = A.shape[-1], B.shape[-2]
        fits_new, fits_old = found == (inputs, outputs), found == (outputs, inputs)
        return fits_old if fits_new != fits_old else None

    def _by_version(self) -> bool | None:
        if self.config.peft_version is None:
            return self.config.by_peft  # PEFT names its version since 0.18
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", self.config.peft_version)
        if numbers is None:
            return None
        version = tuple(int(number) for number in numbers.groups())
        return True if version <= _LAST_BEFORE else False if version >= _FIRST_AFTER else None
