"""A `peft.PeftModel` over a model that is adapted in place and its bank of adapters.

PEFT puts a wrapper around the model and another one around each adapted layer. lorakit changes the layers in place and
keeps the adapters that are not in use off the model. Programs ask PEFT's wrapper by its class and its methods. This one
answers, and holds nothing itself:

    view                 PeftView, a PeftModel        what programs call
    view.base_model      Adapters (`adapters.py`)     PEFT's tuner: it tells the bank what to do
    view.base_model.model                             the model itself; view.get_base_model() too

Layers stay lorakit's, so what a program does to PEFT's layer objects (`layer.lora_A["default"]`) finds none of them.
Parameters have PEFT's names (`tensors.py`), because programs choose by these.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, PeftType
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..bank.bank import Bank
from ..core.errors import LoraError
from ..core.names import VIEWED
from ..core.switching import disabled
from ..formats.peft import config_fields
from .adapters import Adapters
from .settings import lora_config
from .tensors import copy_into


class PeftView(PeftModel):
    """A `peft.PeftModel` whose adapters are a bank's. `peft_view` and `get_peft_model` make it."""

    base_model: Adapters

    def __init__(
        self,
        model: nn.Module | Bank,
        peft_config: PeftConfig | None = None,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        bank = model if isinstance(model, Bank) else Bank(model)
        self.peft_type = PeftType.LORA
        self.special_peft_forward_args = {"adapter_names", "alora_offsets"}
        self._is_prompt_learning = False
        self._adapters_disabled = False
        self.base_model = Adapters(bank)
        self.__dict__[VIEWED] = bank.model  # lorakit's own functions take a view for its model
        for name in bank:
            self.peft_config[name] = lora_config(config_fields(bank[name]))
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
            self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        for name in bank:
            if name not in self.active_adapters:
                self.base_model._train(name, False)
        if _checkpoints_activations(bank.model):
            self.prepare_model_for_gradient_checkpointing(bank.model)

    @property
    def bank(self) -> Bank:
        """The bank of adapters behind this view."""
        return self.base_model.bank

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, **settings: Any) -> None:
        """Add a new adapter, frozen and not active: see PEFT. Raises LoraError for what is no LoRA that lorakit has."""
        if peft_config.peft_type != PeftType.LORA:
            raise LoraError(f"{type(peft_config).__name__}: lorakit makes LoRA adapters. Give a peft.LoraConfig.")
        super().add_adapter(adapter_name, peft_config, **settings)

    # --- which adapter ----------------------------------------------------------------------------------------------

    @property
    def active_adapter(self) -> Any:
        """The name of the active adapter, the first of several; [] where there is none, as in PEFT."""
        return next(iter(self.active_adapters), [])

    @active_adapter.setter
    def active_adapter(self, value: Any) -> None:
        """PeftModel's own methods write it. The bank knows."""

    @property
    def active_adapters(self) -> list[str]:
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        """The configuration of the active adapter, or of the first one where none is active."""
        name = next(iter([*self.active_adapters, *self.peft_config]), None)
        if name is None:
            raise LoraError("the model has no adapter: call add_adapter or load_adapter first.")
        return self.peft_config[name]

    @property
    def has_active_enabled_adapter(self) -> bool:
        return not self._adapters_disabled

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is the base model: see `lorakit.disabled`."""
        was = self._adapters_disabled
        self._adapters_disabled = True
        try:
            with disabled(self.base_model.model):
                yield
        finally:
            self._adapters_disabled = was

    # --- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> PeftView:
        """A view of `model` with the adapter in this folder."""
        view = cls(model)
        view.load_adapter(
            model_id, adapter_name, is_trainable=is_trainable, autocast_adapter_dtype=autocast_adapter_dtype, **kwargs
        )
        if config is not None:
            config.inference_mode = not is_trainable
            view.peft_config[adapter_name] = config
        view.set_adapter(adapter_name, inference_mode=not is_trainable)
        return view

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Load the adapter in a folder under this name. It does not become active. One of this name is filled.

        Raises FileNotFoundError, or LoraError for what does not fit: nothing is left out, so no key is ever missing.
        """
        folder = Path(model_id) / (kwargs.get("subfolder") or "")
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such adapter folder. Download an adapter of the hub before.")
        self.base_model.load(folder, adapter_name, is_trainable)
        self.base_model._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not is_trainable:
            self.eval()
        return _IncompatibleKeys([], [])

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as PEFT lays them out: "default" into the folder, the others into sub-folders by name."""
        folder = Path(save_directory)
        if folder.is_file():
            raise LoraError(f"{folder} is a file: give a folder to save the adapters in.")
        if not safe_serialization:
            raise LoraError(
                "safe_serialization=False: lorakit writes safetensors, which PEFT reads as well. Leave it out."
            )
        if state_dict is not None:
            raise LoraError(
                "save_pretrained(state_dict=…): lorakit reads the adapters from the model itself. Leave it out. A "
                "sharded model is saved by lorakit.save, called in every process."
            )
        names = list(self.peft_config) if selected_adapters is None else selected_adapters
        for name in names:
            if name not in self.peft_config:
                raise LoraError(
                    f"selected_adapters={selected_adapters}: there is no {name!r}, but {list(self.peft_config)}."
                )
        if not is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self.create_or_update_model_card(str(folder))
        for name in names:
            with self.base_model._steady():
                adapter = self.bank[name]
            adapter.save(folder if name == "default" else folder / name)

    # --- tensors, under PEFT's names ---------------------------------------------------------------------------------

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        inside = f"{prefix}.base_model" if prefix else "base_model"
        yield from self.base_model.named_parameters(inside, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return self.base_model.parameters(recurse)

    def get_parameter(self, target: str) -> nn.Parameter:
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if name == target:
                return parameter
        own: nn.Parameter = super().get_parameter(target)  # by the model's own name
        return own

    def get_submodule(self, target: str) -> nn.Module:
        try:
            own: nn.Module = super().get_submodule(target)  # by the model's own name
        except AttributeError:
            found = dict(self.named_modules(remove_duplicate=False))
            if target not in found:
                raise
            own = found[target]
        return own

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Copy tensors into those of the same names. assign is ignored: the tensors stay the same objects."""
        missing, unexpected, misfits = copy_into(self.state_dict(keep_vars=True), state_dict)
        if misfits or (strict and (missing or unexpected)):
            listed = [
                *misfits,
                *(f"missing {name}" for name in missing),
                *(f"unexpected {name}" for name in unexpected),
            ]
            raise RuntimeError(f"the state dict does not fit {type(self).__name__}: {'; '.join(listed[:20])}")
        return _IncompatibleKeys(missing, unexpected)


def _checkpoints_activations(model: nn.Module) -> bool:
    """Whether a transformers model computes activations again, by the name that its version has for it."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return next((bool(getattr(model, name)) for name in names if hasattr(type(model), name)), False)
