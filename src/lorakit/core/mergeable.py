"""A layer whose stored weight takes part in a change that can be merged into it, for every way of changing it.

`StoredWeight` tells the stored weight from the one that a model computes with. `Mergeable` puts the changed weight in
the place of the stored one, and takes that back.

Merging puts a new Parameter in the place of `weight` and keeps the old one aside; unmerging puts the old one back. So
the base weight is restored bit for bit in every dtype, however often, and a weight that is tied to another module's
(lm_head and embedding) is not changed under that module. The price is memory: merged layers hold their weight twice
until `unmerge`, or until `detach`, which keeps only the merged one. What a program writes to the merged weight is kept
as in loralib: unmerging takes the update out of it.

The state dict holds the base weight whether the layer is merged or not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .autograd import reshaped
from .errors import LoraError
from .fingerprint import tensor_fingerprint
from .running import model_is_running
from .sharded import is_sharded
from .switchable import Switchable

MERGED = "_lorakit_merged"  # an attribute of the Parameters that `merge` makes


class StoredWeight(Switchable):
    """A module with a stored weight, and another one that a model computes with while it runs."""

    merged: bool = False
    read_as_sum: bool = False  # whether a model that reads `weight` gets the changed one: `attach` sets it
    inside: bool = False  # while a forward pass that is not lorakit's computes with the weight itself
    plain_class: ClassVar[Any] = None  # what a joined class has behind it

    @property
    def own_weight(self) -> Tensor:
        """The stored weight: W, or what took its place in `merge`."""
        if "weight" in self.__dict__:  # a tensor put there by data parallelism or pruning
            put: Tensor = self.__dict__["weight"]
            return put
        if "weight" not in self._parameters:
            return self._computed_weight()
        weight = self._parameters["weight"]
        return weight  # type: ignore[return-value]

    def _computed_weight(self) -> Tensor:
        """The weight of a layer that stores none."""
        raise AttributeError("weight")

    @property
    def weight(self) -> Tensor:
        """The stored weight; for a model that computes with it instead of calling the layer, the changed one."""
        if self.read_as_sum and not self.inside and self.active and model_is_running():
            # FSDP2 looks at its own parts inside the first forward pass. A model sees the whole weight.
            return self.own_weight if is_sharded(self.own_weight) else self.read()
        return self.own_weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self.__dict__["weight"] = value  # no Parameter: nn.Module keeps those

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    @property
    def base_weight(self) -> Tensor:
        """The stored weight without what `merge` changed in it."""
        return self.own_weight

    def read(self) -> Tensor:
        """The changed weight, for code that computes with it."""
        raise NotImplementedError

    def plain_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the class behind computes, with the stored weight."""
        object.__setattr__(self, "inside", True)  # past nn.Module's slow one
        try:
            y: Tensor = self.plain_class.forward(self, x, *args, **kwargs)
        finally:
            object.__setattr__(self, "inside", False)
        return y

    @property
    def active(self) -> bool:
        """Whether the forward pass adds the update to what the weight gives."""
        return not self.disabled_by and not self.merged and self.has_update


class Mergeable(StoredWeight):
    """What every changed layer shares: merging, modes and the state dict."""

    merge_weights: bool = False  # merge in `eval()`, unmerge in `train()`
    _merge_later: bool = False  # while disabled: to be merged when the last of them closes
    _base_weight: Tensor | None = None  # while merged: the weight as it was,
    _merged_weight: Tensor | None = None  # the one in its place,
    _merged_mark: Tensor | None = None  # and what tells whether anyone wrote on that

    # --- what a way of changing the weight supplies ---------------------------------------------------------------

    @property
    def witness(self) -> nn.Parameter:
        """A parameter of the update: one that a merged layer leaves without a gradient."""
        raise NotImplementedError

    @property
    def like(self) -> Tensor:
        """A tensor of the weight's dtype and device."""
        return self.own_weight

    def adapted_weight(self) -> Tensor:
        """The changed weight, laid out as the stored one and rounded once to its dtype."""
        raise NotImplementedError

    def refit(self) -> None:
        """Let the update follow a weight whose number of rows changed. Raises LoraError where it cannot."""
        raise NotImplementedError

    def _without_update(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The base weight that belongs to what was written on the merged one, and the tensors of the update that have
        other values then, by name.
        """
        raise NotImplementedError

    def merge_refusal(self) -> str | None:
        """Why the update cannot be folded into the weight, or None where it can."""
        if is_sharded(self.own_weight):
            return "its weight is sharded (FSDP2 or tensor parallelism). Save the adapter, and merge it in one process"
        return None

    def _put_weight(self, weight: Tensor) -> None:
        self.weight = weight

    def _weight_key(self, prefix: str) -> str:
        return f"{prefix}weight"

    # --- merging --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(self) -> None:
        """Put the changed weight in the place of the stored one. Nothing to do when merged already."""
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
                    kept, changed = self._without_update()
                    if self.own_weight is not self._merged_weight:  # the program's own from now on
                        base = self.own_weight
                    base.data = kept
                    for name, value in changed.items():
                        getattr(self, name).data = value
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
        wants_gradient = torch.is_grad_enabled() and self.merged and self.has_update and self.witness.requires_grad
        if wants_gradient and not torch.compiler.is_compiling():
            guarded: Tensor = _MergedGuard.apply(y, self.witness)
            return guarded
        return y

    # --- state: independent of the mode it is taken or loaded in ----------------------------------------------------

    @property
    def base_weight(self) -> Tensor:
        return self.own_weight if self._base_weight is None else self.base_state()[0]

    def base_state(self) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The base weight of a merged layer, and the tensors of the update that differ because of what was written."""
        assert self._base_weight is not None
        return self._without_update() if self._is_written else (self._base_weight, {})

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._base_weight is not None and self.has_update:
            base, changed = self.base_state()
            destination |= {f"{prefix}{name}": value for name, value in changed.items()}
            destination[self._weight_key(prefix)] = base if keep_vars else base.detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with unmerged(self):
            super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # .to(), .half(), .cuda(): move the base weight, then merge again, so that it is rounded once.
        with unmerged(self):
            return super()._apply(*args, **kwargs)


class unmerged:
    """A context in which a layer is not merged. Afterwards it is as before."""

    def __init__(self, layer: Mergeable) -> None:
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
            "backward through a merged LoRA layer: its trained parameters would get no gradient. "
            "Call model.train() (layers made by constructors) or lorakit.unmerge(model) first, "
            "or run the forward pass under torch.no_grad()."
        )
