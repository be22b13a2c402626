"""PEFT's tuner over a bank: what a view asks for, said to the bank, and the tensors under PEFT's names."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from ..bank.bank import Bank
from ..core.adapted import AdaptedLayer
from ..core.adapter import Adapter
from ..core.attach import adapted_layers
from ..core.errors import LoraError
from ..core.layouts import Lookup
from ..core.mergeable import Mergeable
from ..core.switching import bake, disabled, merge, unmerge
from ..formats import read_for
from ..formats.peft import config_fields
from .settings import begins_at_random, lora_config, settings_of
from .tensors import LayerView, PeftTensors, copy_into, tree
from .weighted import weighted_sum

BASE = "__base__"  # PEFT's word for a row without an adapter


class Adapters(BaseTuner):
    """What PEFT calls the tuner of a model: its adapters by name, and which of them is active."""

    prefix = "lora_"
    tuner_layer_cls = LayerView

    def __init__(self, bank: Bank) -> None:
        nn.Module.__init__(self)
        self.model = bank.model
        self.bank = bank
        self.peft_config: dict[str, PeftConfig] = {}
        self._off: contextlib.ExitStack | None = None  # while `disable_adapter_layers` is in force
        self._unmerged: Any = None  # what was in use before other adapters were merged

    # --- which one is active ----------------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        used = self.bank.used
        return [] if used is None else [used] if isinstance(used, str) else list(used)

    @property
    def active_adapter(self) -> str | list[str]:
        return self.active_adapters

    @property
    def merged_adapters(self) -> list[str]:
        merged = any(layer.merged for layer in adapted_layers(self.model).values())
        return self.active_adapters if merged else []

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Use one adapter and train it alone, or use the sum of several. A sum is of copies and is not trained."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if self.merged_adapters:
            self.unmerge_adapter()
        with self._steady():
            self._use(names)
            for name in self.bank:
                self._train(name, name in names and not inference_mode)

    def _use(self, names: Sequence[str]) -> None:
        self.bank.use(names[0] if len(names) == 1 else dict.fromkeys(names, 1.0))

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self._train(name, requires_grad)

    def _train(self, name: str, train: bool) -> None:
        adaptation = self.bank.adaptation(name)
        for layer in adaptation.mergeable().values():
            for parameter in _factors(layer).values():
                parameter.requires_grad_(train)
        if adaptation.is_on:
            for tensor in adaptation.trained().values():
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(train)

    # --- the bank's adapters -----------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, **unused: Any) -> None:
        """Make the adapter that `peft_config` describes, frozen and not active."""
        config = self.peft_config[adapter_name]
        assert isinstance(config, LoraConfig)
        with self._steady():
            used = self.bank.used
            self.bank.use(None)
            try:
                self.bank[adapter_name] = settings_of(config, self.model)
            finally:
                self.bank.use(used)
            if begins_at_random(config):
                for layer in self.bank.adaptation(adapter_name).layers().values():
                    _draw(layer)
        self._train(adapter_name, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was active, another one becomes active, if there is one."""
        if adapter_name not in self.peft_config:
            raise LoraError(f"there is no adapter {adapter_name!r} to delete; there are {list(self.peft_config)}.")
        if adapter_name in self.merged_adapters:
            raise LoraError(f"adapter {adapter_name!r} is merged into the model. Call unmerge_adapter() first.")
        with self._steady():
            was_active = adapter_name in self.active_adapters
            del self.bank[adapter_name], self.peft_config[adapter_name]
        if was_active and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))

    def load(self, path: Path, adapter_name: str, trainable: bool) -> None:
        """Put the adapter at a path into the bank. One of this name is filled, and keeps its parameters if it can."""
        adapter = read_for(self.model, path)
        known = adapter_name in self.peft_config
        with self._steady():
            if not (known and self._fill(adapter_name, adapter)):
                self.bank[adapter_name] = adapter
                self._train(adapter_name, trainable or (known and adapter_name in self.active_adapters))
        if not known:
            self.peft_config[adapter_name] = LoraConfig.from_pretrained(str(path), inference_mode=not trainable)

    def _fill(self, name: str, adapter: Adapter) -> bool:
        """Copy the values of `adapter` into the tensors of the one of this name, if all of them fit."""
        adaptation = self.bank.adaptation(name)
        layers, own = adaptation.layers(), adaptation.values()
        tables = adaptation.tables()
        if layers.keys() != adapter.updates.keys() or own.keys() != adapter.trained.keys():
            return False
        if {table: rows.tokens for table, rows in tables.items()} != {
            table: rows.tokens for table, rows in adapter.token_rows.items()
        }:
            return False
        into: dict[str, Tensor] = dict(own) | {f"{table}.lora_rows": rows.lora_rows for table, rows in tables.items()}
        given: dict[str, Tensor] = dict(adapter.trained)
        given |= {f"{table}.lora_rows": rows.values for table, rows in adapter.token_rows.items()}
        for layer_name, layer in layers.items():
            update = adapter.updates[layer_name]
            if update.scale != layer.scaling or "lora_A0" in layer._buffers:
                return False
            into |= {f"{layer_name}.{local}": own for local, own in _factors(layer).items()}
            given |= {f"{layer_name}.{local}": value for local, value in update.tensors().items()}
        if into.keys() != given.keys() or any(into[name].shape != given[name].shape for name in into):
            return False
        copy_into(into, given)
        return True

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        **unused: Any,
    ) -> None:
        """A new adapter, frozen and not active, whose update is the weighted sum of others': see `weighted.py`."""
        with self._steady():
            own = [self.bank[name] for name in adapters]
            adapter = weighted_sum(own, weights, combination_type, svd_rank)
            self.bank[adapter_name] = adapter
            self._train(adapter_name, False)
        self.peft_config[adapter_name] = lora_config(config_fields(adapter))

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Without autocast, PEFT wants the factors in the weights' own dtype."""
        if not autocast_adapter_dtype:
            for layer in self.bank.adaptation(adapter_name).mergeable().values():
                for factor in _factors(layer).values():
                    if layer.like.dtype.is_floating_point:
                        factor.data = factor.data.to(layer.like.dtype)

    # --- merging, switching off --------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the active adapters, or those named, beside those that are merged already."""
        merged = self.merged_adapters
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = list(dict.fromkeys([*merged, *wanted]))
        if not names:
            raise LoraError("there is no adapter to merge: name one, or call set_adapter first.")
        with self._enabled():
            if set(names) != set(self.active_adapters):
                before = self.bank.used if self._unmerged is None else self._unmerged
                self.unmerge_adapter()
                self._unmerged = before
                self._use(names)
            merge(self.model)
            if safe_merge:
                self._refuse_broken()

    def unmerge_adapter(self) -> None:
        with self._enabled():
            _unmerge_if_any(self.model)
            if self._unmerged is not None:
                self.bank.use(self._unmerged)
                self._unmerged = None

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The plain model with the active adapters, or those named, in its weights. It has no adapters afterwards."""
        self.merge_adapter(adapter_names, safe_merge)
        self.enable_adapter_layers()
        bake(self.model)
        self._forget()
        return self.model

    def unload(self) -> nn.Module:
        """The plain model as it was before it had adapters."""
        self.enable_adapter_layers()
        self.bank.use(None)
        self._forget()
        return self.model

    def _forget(self) -> None:
        for name in list(self.bank):
            del self.bank[name]
        self.peft_config.clear()

    def _refuse_broken(self) -> None:
        broken = [name for name, layer in adapted_layers(self.model).items() if not layer.weight.isfinite().all()]
        if broken:
            self.unmerge_adapter()
            raise LoraError(
                f"the merged weight of {broken[0]!r} has values that are not finite, and so has the adapter "
                f"{', '.join(self.active_adapters)}. The model is not merged. Look at it with lorakit.diagnose."
            )

    def disable_adapter_layers(self) -> None:
        """Make the model the base model, until `enable_adapter_layers`."""
        if self._off is None:
            self._off = contextlib.ExitStack()
            self._off.enter_context(disabled(self.model))

    def enable_adapter_layers(self) -> None:
        if self._off is not None:
            off, self._off = self._off, None
            off.close()

    @contextlib.contextmanager
    def _enabled(self) -> Iterator[None]:
        """Inside, `disable_adapter_layers` is not in force."""
        was_off = self._off is not None
        self.enable_adapter_layers()
        try:
            yield
        finally:
            if was_off:
                self.disable_adapter_layers()

    @contextlib.contextmanager
    def _steady(self) -> Iterator[None]:
        """Inside, the bank may take adapters off and put them on. The model is merged or disabled again afterwards."""
        with self._enabled():
            was_merged = bool(self.merged_adapters)
            try:
                yield
            finally:
                if was_merged and self.active_adapters:
                    merge(self.model, force=True)

    # --- calls -------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Inside, each row of the batch has the adapter that `adapter_names` gives it. PeftModel enters this."""
        if kwargs.get("alora_offsets") is not None:
            raise LoraError(
                "alora_offsets: lorakit has no aLoRA, whose update acts after some tokens only. Leave it out."
            )
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.merged_adapters:
            raise LoraError(
                "adapter_names: the model has merged adapters, which all rows get. Call unmerge_adapter() first."
            )
        with self.bank.rows([None if name == BASE else name for name in names]):
            yield

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise LoraError("lorakit adapts layers in place: call add_adapter.")

    # --- tensors and modules, under PEFT's names ---------------------------------------------------------------------

    def children(self) -> Iterator[nn.Module]:
        yield self.model

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The model, and a second time the parameters of the adapters under the names of `named_parameters`.

        transformers' Trainer collects the names of the parameters to decay by walking from child to child.
        """
        yield "model", self.model
        yield "model", tree(PeftTensors(self.bank).parameters())

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        seen = set() if memo is None else memo
        inside = f"{prefix}.model" if prefix else "model"
        found = [(f"{inside}.{name}" if name else inside, module) for name, module in PeftTensors(self.bank).modules()]
        modules: list[tuple[str, nn.Module]] = [(prefix, self), *found]
        for name, module in modules:
            if not (remove_duplicate and module in seen):
                seen.add(module)
                yield name, module

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        inside = f"{prefix}.model." if prefix else "model."
        seen: set[int] = set()
        for name, parameter in PeftTensors(self.bank).parameters() if recurse else ():
            if not (remove_duplicate and id(parameter) in seen):
                seen.add(id(parameter))
                yield inside + name, parameter

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Without their names, which take longer to find than a small step of training."""
        if not recurse:
            return
        own = list(self.model.parameters())
        seen = {id(parameter) for parameter in own}
        yield from own
        for name in self.bank:
            adaptation = self.bank.adaptation(name)
            for layer in adaptation.mergeable().values() if not adaptation.is_on else ():
                yield from (own for own in _factors(layer).values() if id(own) not in seen)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        found = {} if destination is None else destination
        for name, tensor in PeftTensors(self.bank).state().items():
            found[f"{prefix}model.{name}"] = tensor if keep_vars or not isinstance(tensor, Tensor) else tensor.detach()
        return found


def _unmerge_if_any(model: nn.Module) -> None:
    if adapted_layers(model):
        unmerge(model)


def _factors(layer: Mergeable) -> dict[str, nn.Parameter]:
    """Its own parameters that belong to the adapter: factors, magnitude, trained rows."""
    return {name: own for name, own in layer._parameters.items() if name.startswith("lora_") and own is not None}


@torch.no_grad()
def _draw(layer: AdaptedLayer) -> None:
    """Draw B as torch draws a linear layer's weight, and both factors of an embedding from N(0, 1), as PEFT does."""
    if isinstance(layer.layout, Lookup):
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    else:
        nn.init.kaiming_uniform_(layer.lora_B, a=math.sqrt(5))
