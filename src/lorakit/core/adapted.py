"""`AdaptedLayer`: a layer with an update that can be merged, switched off, saved and moved, for every kind of layer.

Merging  W ← g ⊙ (W + s·B A)  puts a new Parameter in the place of `weight` and keeps the old one aside; unmerging puts
the old one back. So the base weight is restored bit for bit in every dtype, however often, and a weight that is tied
to another module's (lm_head and embedding) is not changed under that module. The price is memory: merged layers hold
their weight twice until `unmerge`, or until `detach`, which keeps only the merged one. What a program writes to the
merged weight is kept as in loralib: unmerging subtracts the update from it.

The state dict holds the base weight whether the layer is merged or not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Update
from .autograd import reshaped
from .errors import LoraError
from .fingerprint import tensor_fingerprint
from .lora_layer import LayerWithUpdate
from .matrix import precise

MERGED = "_lorakit_merged"  # an attribute of the Parameters that `merge` makes


class AdaptedLayer(LayerWithUpdate):
    """What every layer kind shares: merging, modes and the state dict, over the update of `LayerWithUpdate`.

    Parameters named `lora_*` are the adapter: `lora_A`, `lora_B`, with DoRA `lora_magnitude` (out,), and with the
    inits "pissa" and "olora" the constant buffers `lora_A0`, `lora_B0`.
    """

    _merge_later: bool = False  # while disabled: to be merged when the last of them closes
    _base_weight: Tensor | None = None  # while merged: the weight as it was,
    _merged_weight: Tensor | None = None  # the one in its place,
    _merged_mark: Tensor | None = None  # and what tells whether anyone wrote on that

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

    # --- merging --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """W ← g ⊙ (W + s·ΔW). Nothing to do when merged already."""
        if self.disabled_by:
            self._merge_later = True
            return
        if self.merged:
            return
        if self.has_update:
            self.refit()
            base = self.own_weight
            merged = nn.Parameter(self.adapted_weight(), requires_grad=base.requires_grad)
            merged.__dict__[MERGED] = True
            # Past nn.Module's __setattr__: the weights must not appear among the parameters a second time.
            self.__dict__ |= {
                "_base_weight": base,
                "_merged_weight": merged,
                "_merged_mark": tensor_fingerprint(merged),
            }
            self._put_weight(merged)
        self.merged = True

    def bake(self) -> None:
        """Merge, and drop the old weight: afterwards `unmerge` changes nothing."""
        if self.disabled_by:
            raise LoraError("the model is inside lorakit.disabled, where it is the base model. Leave that first.")
        self.merge()
        for name in ("_base_weight", "_merged_weight", "_merged_mark"):
            self.__dict__.pop(name, None)

    def unmerge(self) -> None:
        """Put back the weight as it was before `merge`: the same object, bit for bit."""
        if self.disabled_by:
            self._merge_later = False
            return
        if self._base_weight is not None:
            if self.has_update:  # a program that deleted lora_A while merged means to keep the merged weight
                base = self._base_weight
                if self._is_written:
                    kept, magnitude = self._without_update()
                    if self.own_weight is not self._merged_weight:  # the program's own from now on
                        base = self.own_weight
                    base.data = kept
                    if magnitude is not None:
                        self.lora_magnitude.data = magnitude
                if not self.own_weight.requires_grad:  # frozen meanwhile
                    base.requires_grad = False
                self._put_weight(base)
            for name in ("_base_weight", "_merged_weight", "_merged_mark"):
                self.__dict__.pop(name, None)
        self.merged = False

    @property
    def _is_written(self) -> bool:
        """Whether the weight is no longer what `merge` put in its place: written on, assigned, resized.

        A weight tied again meanwhile (`tie_weights`) is no write: it is another layer's merged one or the base.
        """
        tied = self.own_weight is not self._merged_weight and MERGED in self.own_weight.__dict__
        if self._merged_mark is None or self.own_weight is self._base_weight or tied:
            return False
        mark = tensor_fingerprint(self.own_weight)
        return mark is None or bool(mark != self._merged_mark)

    @torch.no_grad()
    def _without_update(self) -> tuple[Tensor, Tensor | None]:
        """The base weight that belongs to what was written on the merged one, and DoRA's magnitude for it.

        W ← W' − s·ΔW where W' was written, which loses nothing but the last digits; the old bits elsewhere. With DoRA
        the magnitude of a row that was written is its norm, so that the adapted row is what was written.
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
        magnitude = None
        if "lora_magnitude" in self._parameters:
            whole = self.matrix(same).all(1)
            same = self.from_matrix(whole[:, None].expand(self.matrix(same).shape))
            norms = torch.linalg.vector_norm(self.matrix(precise(written)), dim=1).to(self.lora_magnitude.dtype)
            magnitude = torch.where(whole, self.lora_magnitude, norms)
        matrix = self.matrix(precise(written)) - self.scaling * self._dense()
        kept = self.from_matrix(matrix).to(written.dtype, memory_format=torch.contiguous_format)
        if rows:
            kept[:rows] = torch.where(same[:rows], base[:rows].to(kept), kept[:rows])
        return kept, magnitude

    def _put_weight(self, weight: Tensor) -> None:
        self.weight = weight

    def disable(self) -> None:
        """Take the update out of the forward pass, until `enable` was called as often."""
        if not self.disabled_by:
            was_merged = self.merged
            self.unmerge()
            self._merge_later = was_merged
        self.disabled_by += 1

    def enable(self) -> None:
        """Take one `disable` back."""
        if self.disabled_by > 1:
            self.disabled_by -= 1
            return
        merges = self._merge_later
        for name in ("disabled_by", "_merge_later"):
            self.__dict__.pop(name, None)  # back to the class's own
        if merges:
            self.merge()

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        if self.merge_weights:
            if mode:
                self.unmerge()
            else:
                self.merge()
        return self

    def guard(self, y: Tensor) -> Tensor:
        """`y` from a merged weight: a backward pass through it would silently leave the adapter without a gradient.

        So it raises instead (problem 17). Costs nothing where no gradient is recorded.
        """
        wants_gradient = torch.is_grad_enabled() and self.merged and self.has_update and self.lora_A.requires_grad
        if wants_gradient and not torch.compiler.is_compiling():
            guarded: Tensor = _MergedGuard.apply(y, self.lora_A)
            return guarded
        return y

    # --- state: independent of the mode it is taken or loaded in ----------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None and self.has_update:
            base = self._base_weight
            if self._is_written:
                base, magnitude = self._without_update()
                if magnitude is not None:
                    destination[f"{prefix}lora_magnitude"] = magnitude
            destination[self._weight_key(prefix)] = base if keep_vars else base.detach()

    def _weight_key(self, prefix: str) -> str:
        return f"{prefix}weight"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with unmerged(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # .to(), .half(), .cuda(): move the base weight, then merge again, so that it is rounded once.
        with unmerged(self):
            return super()._apply(*args, **kwargs)

    def extra_repr(self) -> str:
        base = super().extra_repr()
        return f"{base}, r={self.r}, lora_alpha={self.lora_alpha}" if self.has_update else base


class unmerged:
    """A context in which a layer is not merged. Afterwards it is as before."""

    def __init__(self, layer: AdaptedLayer) -> None:
        self.layer, self.was_merged = layer, layer.merged

    def __enter__(self) -> None:
        if self.was_merged:
            self.layer.unmerge()

    def __exit__(self, *error: object) -> None:
        if self.was_merged:
            self.layer.merge()


class _MergedGuard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, A: Tensor) -> Tensor:
        return reshaped(y, y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "backward through a merged LoRA layer: lora_A and lora_B would get no gradient. "
            "Call model.train() (layers made by constructors) or lorakit.unmerge(model) first, "
            "or run the forward pass under torch.no_grad()."
        )
