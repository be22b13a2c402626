"""An embedding with an update: tokens look up columns of A."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import layouts
from ..adapted import AdaptedLayer
from ..embedding import lora_embedding
from ..errors import LoraError
from ..init import Init, init_of
from ..lora_layer import LoRALayer


class Embedding(AdaptedLayer, nn.Embedding):
    """y = W[tokens] + s · A[:, tokens]ᵀ Bᵀ     weight (vocabulary, dim); A (r, vocabulary); B (dim, r)

    The padding row has no update. max_norm is refused: torch renormalises the stored weight in place during the
    lookup, which has no meaning for a sum of a frozen weight and an update.
    """

    plain_layout = layouts.Lookup()

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = True,
        **kwargs: Any,
    ) -> None:
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **kwargs)
        LoRALayer.__init__(self, r, lora_alpha, 0.0, merge_weights)
        if r > 0 and self.max_norm is not None:
            raise LoraError(
                f"Embedding: max_norm={self.max_norm} cannot be combined with a LoRA update (r={r}): torch "
                "renormalises the frozen weight in place at each lookup. Leave max_norm out, or set r=0."
            )
        self.construct(r, self.factor_shapes)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.has_update:
            self.draw(self.lora_A, self.lora_B, init_of("kaiming"))

    @classmethod
    def refusal_of(cls, module: Any) -> str | None:
        if module.max_norm is not None:
            return f"max_norm={module.max_norm} renormalises the frozen weight in place at each lookup"
        return super().refusal_of(module)

    def draw(self, A: Tensor, B: Tensor, init: Init) -> None:
        assert init.draw is not None
        init.draw(A, B, not self.read_whole)
        if self.padding_idx is not None:
            A.data[:, self.padding_idx] = 0

    def take(self, rank: int, init: Init) -> tuple[Tensor, Tensor]:
        A, B = super().take(rank, init)
        if self.padding_idx is not None:
            A[:, self.padding_idx] = 0  # no gradient will reach it either
        return A, B

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.num_embeddings), (self.embedding_dim, rank)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T

    def resized(self, outputs: int, inputs: int) -> dict[str, tuple[int, int]]:
        # DoRA's norms are taken over all rows, so they change with the number of rows.
        if outputs != len(self.lora_B) or "lora_magnitude" in self._parameters:
            return super().resized(outputs, inputs)
        self.num_embeddings = inputs
        return {
            name: (1, inputs) for name in ("lora_A", "lora_A0") if name in self._parameters or name in self._buffers
        }

    def forward(self, tokens: Tensor) -> Tensor:
        base = F.embedding(
            tokens,
            self.own_weight,
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )
        if not self.active:
            return self.guard(base)
        if self.own_weight.shape != (self.lora_A.shape[1], self.lora_B.shape[0]):
            self.refit()
        self.mark()
        A, B = self.factors()
        y = lora_embedding(
            tokens,
            base,
            A,
            B,
            self.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            dropout=self.acting_dropout,
        )
        gain = self.gain()
        return y if gain is None else y * gain.to(y.dtype)
