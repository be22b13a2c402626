"""LoRA's settings as one value, which checks itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .errors import LoraError
from .init import init_of
from .trainable import Bias
from .words import suggestion

Filter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True)
class LoRASettings:
    """How `attach` adapts a model: y = W x + b becomes y = W x + b + (alpha/rank) · B A x in every target layer.

    targets: "all-linear" (every linear layer but the head), "all-linear+experts" (and the stacked matrices of a
        mixture's experts), a name's end ("q_proj"), a glob over whole names ("*.q_proj"), a list of these, or a
        function (module, name) → bool. The name of a parameter that belongs to no layer adapts that parameter
        ("experts.gate_up_proj"). The name of an nn.MultiheadAttention adapts all its projections. The name of a module
        with the stacked matrices of experts adapts all of these.
    exclude: what to leave out of the targets, as ends of names and globs ("*.layers.0.*").
    rank, alpha: r and α. α is the same at every rank, because one learning rate then fits more ranks than with an α
        proportional to r (docs/results.md). rank_pattern, alpha_pattern: other values for matching modules.
        A sequence of ranks adapts the blocks of a fused output, and 0 leaves a block out: {"c_attn": [8, 0, 8]} is q
        and v of GPT-2, as in the paper. The blocks have equal sizes unless `splits` gives their sizes:
        {"qkv_proj": [512, 128, 128]}.
    dropout: the probability of dropping an element of the update's input; an embedding drops whole tokens.
    rslora: scale α/√r. dora: also learn the magnitude of each row.
    init: how A and B begin, see `init.py`; the model's output is unchanged at first, up to rounding with pissa, olora
        and dora.
    bias: train no biases ("none"), those of the adapted layers ("lora_only"), or all ("all"). also_train: modules to
        train whole, named like targets (a new classifier head).
    trainable_tokens: tokens whose rows of the input embedding are trained, while the rest of the table stays frozen
        ([32000, 32001], after resize_token_embeddings); a tied head computes with the same rows. Or tokens by module:
        {"embed_tokens": [32000], "lm_head": [32000]} (see `token_rows.py`).
    dtype: of the factors; by default the weight's, or float32 beside float16 and bfloat16 weights.

    Raises LoraError for an invalid value.
    """

    targets: str | Iterable[str] | Filter = "all-linear"
    exclude: str | Sequence[str] = ()
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False
    init: str = "kaiming"
    rank_pattern: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    splits: Mapping[str, Sequence[int]] = field(default_factory=dict)
    bias: Bias = "none"
    also_train: str | Iterable[str] = ()
    trainable_tokens: Sequence[int] | Mapping[str, Sequence[int]] = ()
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern", "splits", "trainable_tokens"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})
        check_scale(self.rank, self.alpha)
        if not 0 <= self.dropout < 1:
            raise LoraError(f"dropout={self.dropout}: a probability in [0, 1) is expected.")
        init_of(self.init)

    @classmethod
    def of(cls, config: Any) -> LoRASettings:
        """The settings that `config` has as attributes of the same names. The others keep their defaults."""
        return cls(
            **{own.name: getattr(config, own.name) for own in dataclasses.fields(cls) if hasattr(config, own.name)}
        )

    @classmethod
    def named(cls, targets: Any, settings: Mapping[str, Any]) -> LoRASettings:
        """The settings given by name. Raises TypeError for an unknown name, with the name that was perhaps meant."""
        known = [own.name for own in dataclasses.fields(cls)]
        for name in settings:
            if name not in known:
                raise TypeError(f"there is no setting {name!r}.{suggestion(name, known)}")
        return cls(targets=targets, **settings)


def check_scale(rank: int, alpha: float | None) -> None:
    """Raise LoraError for an invalid r or α."""
    if rank < 1:
        raise LoraError(f"rank={rank}: a rank is at least 1.")
    if alpha is None or alpha <= 0:  # None was 2·rank before lorakit 0.3
        raise LoraError(f"alpha={alpha}: expected a positive number.")
