"""`AdaptedLayer`: a layer with an update that can be merged, switched off, saved and moved, for every kind of layer.

Merging, modes and the state dict are those of `Mergeable` (`mergeable.py`): W ← g ⊙ (W + s·B A). What a program writes
to the merged weight is kept as in loralib: unmerging subtracts the update from it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .adapter import Update
from .lora_layer import LayerWithUpdate
from .matrix import precise


class AdaptedLayer(LayerWithUpdate):
    """What every layer kind shares: the update of `LayerWithUpdate`, taken from plain data and out of a written weight.

    Parameters named `lora_*` are the adapter: `lora_A`, `lora_B`, with DoRA `lora_magnitude` (out,), and with the
    inits "pissa" and "olora" the constant buffers `lora_A0`, `lora_B0`.
    """

    def take_update(self, update: Update, dtype: torch.dtype) -> None:
        """Hold this update, whose layout and shapes fit, as parameters of this dtype."""
        was_merged = self.merged
        self.unmerge()
        for name in ("lora_A0", "lora_B0"):
            self._buffers.pop(name, None)
        self.set_scale(update.rank, update.alpha, update.rslora)
        for name, tensor in update.tensors().items():
            # A file's own order of dimensions leaves strides that some kernels refuse.
            own = tensor.to(self.like.device, dtype, copy=True, memory_format=torch.contiguous_format)
            setattr(self, name, nn.Parameter(own))
        if was_merged:
            self.merge()

    @torch.no_grad()
    def _without_update(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        """W ← W' − s·ΔW where W' was written, which loses nothing but the last digits; the old bits elsewhere. With
        DoRA the magnitude of a row that was written is its norm, so that the adapted row is what was written.
        """
        written, base = self.own_weight, self._base_weight
        assert base is not None
        same = torch.zeros_like(written, dtype=torch.bool)
        rows = min(len(base), len(written)) if written.shape[1:] == base.shape[1:] else 0
        if rows:
            self._put_weight(base)
            if not self.fits():  # the update has followed the resized weight already
                resized = torch.zeros_like(written)
                resized[:rows] = base[:rows]
                self._put_weight(nn.Parameter(resized, requires_grad=False))
            same[:rows] = self.adapted_weight()[:rows] == written[:rows]
            self._put_weight(written)
        self.refit()
        changed = {}
        if "lora_magnitude" in self._parameters:
            whole = self.matrix(same).all(1)
            same = self.from_matrix(whole[:, None].expand(self.matrix(same).shape))
            norms = torch.linalg.vector_norm(self.matrix(precise(written)), dim=1).to(self.lora_magnitude.dtype)
            changed["lora_magnitude"] = torch.where(whole, self.lora_magnitude, norms)
        matrix = self.matrix(precise(written)) - self.scaling * self._dense()
        kept = self.from_matrix(matrix).to(written.dtype, memory_format=torch.contiguous_format)
        if rows:
            kept[:rows] = torch.where(same[:rows], base[:rows].to(kept), kept[:rows])
        return kept, changed

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return f"{base}, r={self.r}, lora_alpha={self.lora_alpha}" if self.has_update else base
