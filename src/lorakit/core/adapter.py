"""`Adapter`: what was learnt, as plain data. The narrow waist between models and files.

    model  --extract-->  Adapter  --write-->  file
    model  <--insert---  Adapter  <--read---  file

Formats never see a layer, layers never see a file.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .format import format_of
from .layouts import Layout


@dataclass(frozen=True)
class Update:
    """ΔW of one module, as its two factors. Their shapes are those of `layout` (see `layouts.py`)."""

    layout: Layout
    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    rslora: bool = False
    magnitude: Tensor | None = None  # DoRA's m (out,)
    fan_in_fan_out: bool = False  # the module stores its weight as (in, out)
    parameter: str = ""  # of a parameter: its own name, with which the update's name ends (but for a layer's "weight")

    @property
    def kind(self) -> str:
        """The name of the layout."""
        return self.layout.name

    @property
    def scale(self) -> float:
        """s of the equation: α/r, or α/√r with rsLoRA."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def with_factors(self, layout: Layout, A: Tensor, B: Tensor, **changes: Any) -> Update:
        """The update with other factors and the same scale. The rank follows from the factors."""
        if A is self.A and B is self.B and layout == self.layout:
            return dataclasses.replace(self, **changes)
        rank = layout.rank_of(A, B)
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        return dataclasses.replace(self, layout=layout, A=A, B=B, rank=rank, alpha=alpha, **changes)

    def simplest(self) -> Update:
        """The update of the same ΔW that can be added to others: blocks become one block-diagonal B."""
        return self.with_factors(*self.layout.simplest(self.A, self.B))

    def pair(self) -> Update:
        """The same ΔW as A and B of two thin layers in a row. Raises LoraError if there is no such pair."""
        return self.with_factors(*self.layout.pair(self.A, self.B))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the name a layer gives them."""
        named = {"lora_A": self.A, "lora_B": self.B, "lora_magnitude": self.magnitude}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class TokenRows:
    """Rows of a token table that take the place of the base's: values (k, dim), for k tokens in rising order."""

    tokens: tuple[int, ...]
    values: Tensor

    def equals(self, other: TokenRows | None) -> bool:
        """Whether these are the same rows with the same values."""
        return other is not None and self.tokens == other.tokens and torch.equal(self.values, other.values)


@dataclass(frozen=True)
class Adapter:
    """Updates by module name, tensors trained whole by parameter name, and what a reader needs to know of them."""

    updates: dict[str, Update]
    trained: dict[str, Tensor] = field(default_factory=dict)  # heads, biases: full parameter name → value
    also_train: tuple[str, ...] = ()  # the modules that were trained whole
    token_rows: dict[str, TokenRows] = field(default_factory=dict)  # by the name of the table's module
    bias: Literal["none", "lora_only", "all"] = "none"
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # the shortest names that select exactly `updates` in the model
    base_model: str | None = None
    task_type: str | None = None  # PEFT's: CAUSAL_LM, SEQ_CLS, …

    @classmethod
    def load(cls, path: str | Path, *, format: str | None = None, alpha: float | None = None) -> Adapter:
        """The adapter at a path, without a model. format: its name; by default the path tells.

        alpha: needed for a format that does not hold it (loralib's). Raises OSError, or LoraError for what cannot be
        read, and for a file that cannot be understood without its model (then use `lorakit.load(model, path)`).
        """
        return format_of(path, format).read(Path(path), None, alpha)

    def save(self, path: str | Path, *, format: str | None = None) -> None:
        """Write the adapter. format: its name; by default the path tells.

        Raises LoraError for what the format cannot hold.
        """
        format_of(path, format).write(self, Path(path))
