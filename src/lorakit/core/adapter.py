"""`Adapter`: what was learnt, as plain data. The narrow waist between models and files.

    model  --extract-->  Adapter  --write-->  file
    model  <--insert---  Adapter  <--read---  file

Formats never see a layer, layers never see a file.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from .matrix import Blocks, block_diagonal

Kind = Literal["linear", "merged_linear", "embedding", "conv", "conv_loralib", "experts"]


@dataclass(frozen=True)
class Update:
    """ΔW of one module, as its two factors. Shapes by kind (r is `rank`):

    linear          A (r, in)                 B (out, r)
    merged_linear   A (Σ rᵢ, in)              B (Σ sizeᵢ, max r)        sums over the `blocks` with a rank; r = max rᵢ
    embedding       A (r, vocabulary)         B (dim, r)
    conv            A (r, in/groups, *k)      B (out, r, 1, …)
    conv_loralib    A (r·k_last, in·k_last)   B (out/groups·∏k[:-1], r·k_last)
    experts         A (experts, r, in)        B (experts, out, r)
    """

    kind: Kind
    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None  # DoRA's m (out,)
    fan_in_fan_out: bool = False  # linear: the module stores its weight as (in, out)
    blocks: Blocks = ()  # merged_linear: (size, rank) of each block of the output
    groups: int = 1  # conv
    parameter: str = ""  # of a parameter that is read: its own name, the last part of the update's ("weight": no part)

    @property
    def scale(self) -> float:
        """s of the equation: α/r, or α/√r with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def with_rank(self, rank: int, **changes: Any) -> Update:
        """The update with other factors, of another rank, and the same scale."""
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        return dataclasses.replace(self, rank=rank, alpha=alpha, **changes)

    def without_blocks(self) -> Update:
        """A merged_linear update as the linear one of the same ΔW, with a block-diagonal B; any other as it is."""
        if self.kind != "merged_linear":
            return self
        B = block_diagonal(self.B, self.blocks)
        return self.with_rank(B.shape[1], kind="linear", B=B, blocks=())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the name a layer gives them."""
        named = {"lora_A": self.A, "lora_B": self.B, "lora_magnitude": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Layout:
    """How a layer lays out its factors, for files that hold tensors and nothing else (loralib's)."""

    kind: Kind
    blocks: Blocks = ()
    kernel_last: int = 1  # conv_loralib: A has r·kernel_last rows


@dataclass(frozen=True)
class Adapter:
    """Updates by module name, tensors trained whole by parameter name, and what a reader needs to know of them."""

    updates: dict[str, Update]
    trained: dict[str, Tensor] = field(default_factory=dict)  # heads, biases: full parameter name → value
    also_train: tuple[str, ...] = ()  # the modules that were trained whole
    bias: Literal["none", "lora_only", "all"] = "none"
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # the shortest names that select exactly `updates` in the model
    base_model: str | None = None
    task_type: str | None = None  # PEFT's: CAUSAL_LM, SEQ_CLS, …
