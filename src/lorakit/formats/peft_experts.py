"""Stacks of experts' matrices in PEFT's files, whose layout PEFT has changed.

    A (experts·r, in), expert by expert        B (out, r·experts), whose columns run over the experts first

PEFT writes an update of a stack in this way, but PEFT's "in" and "out" are not always those of the layer. A turned file
holds the factors of ΔWᵀ: A (experts·r, out), B (in, r·experts).

    the weight is stored                                 PEFT ≤ 0.18.1    PEFT ≥ 0.19.1
    (experts, out, in)                                   turned           as it is
    (experts, in, out), the module has is_transposed     as it is         as it is
    (experts, in, out), the module does not say so       as it is         turned

The shapes tell whether a stack is turned, unless its matrices are square. Then another stack of the same file tells
which PEFT wrote it, or else the version of PEFT in the configuration.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from ..core.errors import LoraError
from ..core.host import Host
from ..core.layouts import Stack, Stored
from .peft_config import PeftConfig

Era = Literal["old", "new"]  # of PEFT ≤ 0.18.1, of PEFT ≥ 0.19.1; versions between changed the layout in steps
_LAST_OLD, _FIRST_NEW = (0, 18, 1), (0, 19, 1)
VERSIONS: dict[Era, str] = {"old": "0.18.1", "new": "0.19.1"}
_TURNED: dict[Era, Stored] = {"old": "out-in", "new": "in-out"}


def stacked(A: Tensor, B: Tensor, experts: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (experts, r, in) and B (experts, out, r), from the two tensors in a file."""
    return A.unflatten(0, (experts, rank)), B.unflatten(1, (rank, experts)).permute(2, 0, 1)


def flattened(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `stacked`."""
    return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)


def turned(name: str, A: Tensor, B: Tensor, layout: Stack, era: Era) -> tuple[Tensor, Tensor]:
    """A and B of the layout as PEFT's files of that time have them. Raises LoraError where nobody knows."""
    if layout.stored == "?" or (layout.stored == "" and era == "old"):
        raise LoraError(
            f"{name}: this adapter was read without its model, so nobody knows whether its experts' matrices are W or "
            "Wᵀ. Load it into the model with lorakit.load, and save that."
        )
    return (B.mT, A.mT) if layout.stored == _TURNED[era] else (A, B)


class FileOfStacks:
    """What a file says about its stacks. Each of them as `Stack` and as x meets it: see `read`."""

    def __init__(self, config: PeftConfig, host: Host | None, stacks: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """stacks: the name in the model, A (experts, r, …) and B (experts, …, r) of each, as they are in the file."""
        self.config, self.host = config, host
        told = {era for stack in stacks if (era := self._by_shape(*stack)) is not None}
        self.shapes_tell = len(told) == 1
        self.era = told.pop() if self.shapes_tell else self._by_version()

    def read(self, name: str, A: Tensor, B: Tensor) -> tuple[Stack, Tensor, Tensor]:
        """The layout, A (experts, r, in) and B (experts, out, r).

        Without a model they stay as they are in the file. Raises LoraError for a square matrix if nothing tells its
        layout.
        """
        stack = None if self.host is None else self.host.stack(name)
        if stack is None:
            return Stack("" if self.era == "new" else "?"), A, B
        layout, _ = stack
        if layout.stored == "is_transposed":
            return layout, A, B
        era = self._by_shape(name, A, B)
        if era is None and A.shape[-1] == B.shape[-2]:
            era = self._of_a_square(name)
        return (layout, B.mT, A.mT) if era is not None and layout.stored == _TURNED[era] else (layout, A, B)

    def _of_a_square(self, name: str) -> Era:
        if self.era is None:
            raise LoraError(
                f"{name}: its matrices are square, and PEFT {self.config.peft_version} is of the versions that "
                "turned their layout: the file does not tell W from Wᵀ. Load it with the PEFT that wrote it, "
                "save it again with PEFT 0.19.1 or later."
            )
        if not self.shapes_tell and self.config.peft_version is None and not self.config.by_peft:
            warnings.warn(
                f"{self.config.path}: the matrices of {name} are square and no peft_version says how they lie: they "
                "are read as PEFT has written them since 0.19.1, and lorakit always. Before, they were those of Wᵀ.",
                stacklevel=2,
            )
        return self.era

    def _by_shape(self, name: str, A: Tensor, B: Tensor) -> Era | None:
        """Which PEFT's layout the shapes fit. None if they fit both or neither, or if both layouts are the same."""
        stack = None if self.host is None else self.host.stack(name)
        if stack is None or stack[0].stored == "is_transposed":
            return None
        layout, (_, outputs, inputs) = stack
        found = A.shape[-1], B.shape[-2]
        as_it_is, is_turned = found == (inputs, outputs), found == (outputs, inputs)
        if as_it_is == is_turned:
            return None
        return next(era for era, stored in _TURNED.items() if (layout.stored == stored) == is_turned)

    def _by_version(self) -> Era | None:
        if self.config.peft_version is None:
            return "old" if self.config.by_peft else "new"  # PEFT names its version since 0.18
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", self.config.peft_version)
        if numbers is None:
            return None
        version = tuple(int(number) for number in numbers.groups())
        return "old" if version <= _LAST_OLD else "new" if version >= _FIRST_NEW else None
