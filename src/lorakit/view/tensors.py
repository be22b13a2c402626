"""The tensors of a model and its adapters under PEFT's names, where programs look for them.

    lorakit, in place                     PEFT
    q_proj.weight                         q_proj.base_layer.weight
    q_proj.lora_A                         q_proj.lora_A.<adapter>.weight
    embed.lora_A                          embed.lora_embedding_A.<adapter>
    q_proj.lora_magnitude                 q_proj.lora_magnitude_vector.<adapter>.weight
    score.weight, trained whole           score.modules_to_save.<adapter>.weight, score.original_module.weight
    embed.lora_rows                       embed.token_adapter.trainable_tokens_delta.<adapter>
    embed.weight, with trained rows       embed.token_adapter.base_layer.weight; so of a head that is tied to it

They are the same tensors, those of adapters not in use too. Their shapes are lorakit's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..bank.bank import Bank
from ..core.adapted import AdaptedLayer
from ..core.adapter import Update
from ..core.errors import LoraError
from ..core.layouts import Lookup
from ..core.names import named_modules, unwrapped_name
from ..core.parameters import AdaptedParameter
from ..core.token_rows import TrainedRows
from ..core.undo import note
from ..formats.peft_keys import AROUND_ROWS, ROWS
from ..formats.peft_names import places, wrapped


class LayerView(nn.Module, BaseTunerLayer):
    """One adapted layer as PEFT's programs look through it: its adapters' tensors, by adapter. A view to read.

    What a program would do to it does nothing to the model, so it is refused.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(
        self, bank: Bank, module: nn.Module, layers: Mapping[str, AdaptedLayer], one_in_use: AdaptedLayer | None
    ) -> None:
        super().__init__()
        # Not as attributes of nn.Module, which would make the modules children.
        self.__dict__ |= {"base_layer": module, "_bank": bank, "_one_in_use": one_in_use}
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_embedding_A, self.lora_embedding_B = nn.ParameterDict(), nn.ParameterDict()
        self.lora_magnitude_vector, self.lora_dropout = nn.ModuleDict(), nn.ModuleDict()
        self.r = {name: layer.r for name, layer in layers.items()}
        self.lora_alpha = {name: layer.lora_alpha for name, layer in layers.items()}
        self.scaling = {name: layer.scaling for name, layer in layers.items()}
        for name, layer in layers.items():
            lookup = isinstance(layer.layout, Lookup)
            self._put("lora_embedding_A" if lookup else "lora_A", name, layer.lora_A)
            self._put("lora_embedding_B" if lookup else "lora_B", name, layer.lora_B)
            if (magnitude := layer._parameters.get("lora_magnitude")) is not None:
                self._put("lora_magnitude_vector", name, magnitude)
            dropout = layer.lora_dropout
            self.lora_dropout[name] = dropout if isinstance(dropout, nn.Module) else nn.Identity()

    @property
    def active_adapter(self) -> list[str]:
        used = self._bank.used
        return [used] if isinstance(used, str) else list(used or ())

    @property
    def merged_adapters(self) -> list[str]:
        return self.active_adapter if getattr(self.base_layer, "merged", False) else []

    @property
    def disable_adapters(self) -> bool:
        return self._one_in_use is not None and self._one_in_use.disabled_by > 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["base_layer"], name)  # in_features, stride, …

    def _put(self, where: str, adapter: str, tensor: nn.Parameter) -> None:
        held = getattr(self, where)
        if isinstance(held, nn.ParameterDict):
            held[adapter] = tensor
        else:
            held[adapter] = nn.Module()
            held[adapter].weight = tensor

    def _refuse(self, *args: object, **kwargs: object) -> Any:
        raise LoraError(
            "this layer is a view of lorakit's: call the method of the whole model (set_adapter, merge_adapter …)."
        )

    forward = merge = unmerge = enable_adapters = set_adapter = delete_adapter = set_requires_grad = _refuse


class PeftTensors:
    """The names at one moment: which adapter is in use, and what is attached to which module, may change after it.

    They are those inside the model: PeftModel's begin with `base_model.model.`.
    """

    def __init__(self, bank: Bank) -> None:
        self._bank, self._model = bank, bank.model
        self._layers = {name: bank.adaptation(name).layers() for name in bank}
        updates = {own: _update(layer) for layers in self._layers.values() for own, layer in layers.items()}
        self._where = places(updates)
        # The modules that compute with trained rows, by adapter.
        self._tables = {name: list(_with_rows(bank, name)) for name in bank}
        with_rows = {module for tables in self._tables.values() for module, _ in tables}
        self._paths = wrapped(self._where) | {module: f"{module}{AROUND_ROWS}" for module in with_rows}
        self._saved = {name: list(_whole(bank, name)) for name in bank}
        self._whole = sorted({module for modules in self._saved.values() for module in modules})

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Each parameter, a shared one under each of its names: the base's first, then the adapters'."""
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if own := self._name(unwrapped_name(name)):
                yield own, parameter
        for module in self._whole:
            for name, tensor in self._originals(module).items():
                if isinstance(original := _as_parameter(tensor), nn.Parameter):
                    yield name, original
        for name, tensor in self._of_adapters():
            if isinstance(tensor, nn.Parameter):
                yield name, tensor

    def state(self) -> dict[str, Tensor]:
        """The tensors of the state dict. A merged layer has its base weight here, as everywhere in lorakit."""
        found: dict[str, Tensor] = {}
        for name, tensor in self._model.state_dict(keep_vars=True).items():
            if own := self._name(unwrapped_name(name)):
                found[own] = tensor
        for module in self._whole:
            found |= self._originals(module)
        return found | dict(self._of_adapters())

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The model's modules, and a `LayerView` for each adapted layer."""
        for name, module in self._model.named_modules(remove_duplicate=False):
            if not any(part.startswith("lora_") for part in name.split(".")):
                yield self._path(unwrapped_name(name)), module
        for path, view in self.layer_views():
            for name, module in view.named_modules():
                yield f"{path}.{name}" if name else path, module

    def layer_views(self) -> Iterator[tuple[str, LayerView]]:
        on = [own for name, own in self._layers.items() if self._bank.adaptation(name).is_on]
        one_in_use = next((layer for layers in on for layer in layers.values()), None)
        for name, place in self._where.items():
            layers = {adapter: own[name] for adapter, own in self._layers.items() if name in own}
            layer = next(iter(layers.values()))
            owner = name.rpartition(".")[0] if isinstance(layer, AdaptedParameter) and place.path != name else name
            yield place.path, LayerView(self._bank, self._model.get_submodule(owner), layers, one_in_use)

    def _of_adapters(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the adapters alone."""
        for path, view in self.layer_views():
            for name, parameter in view.named_parameters():
                yield f"{path}.{name}", parameter
        for module, place in self._where.items():
            for adapter, layers in self._layers.items():
                for local in ("lora_A0", "lora_B0"):
                    if module in layers and (start := layers[module]._buffers.get(local)) is not None:
                        yield f"{place.path}.{local}.{adapter}", start
        for adapter, tables in self._tables.items():
            for module, rows in tables:
                yield f"{module}{ROWS}.{adapter}", rows.lora_rows
        for adapter, modules in self._saved.items():
            for name, tensor in self._bank.adaptation(adapter).values().items():
                for module in modules:
                    if name.startswith(f"{module}."):
                        local = name.removeprefix(f"{module}.")
                        yield f"{module}.modules_to_save.{adapter}.{local}", _as_parameter(tensor)

    def _name(self, name: str) -> str | None:
        """PEFT's name for a tensor of the model, or None for one that belongs to an adapter."""
        module, _, local = name.rpartition(".")
        if local.startswith("lora_"):
            return None
        if any(f"{module}.".startswith(f"{whole}.") for whole in self._whole):
            return None  # shown with the adapter that trains it
        path = self._path(module)
        return f"{path}.{local}" if path else local

    def _path(self, module: str) -> str:
        """The module's path inside PEFT's layers around it and around what holds it."""
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            outer = ".".join(parts[:end])
            if outer in self._paths:
                return ".".join([self._paths[outer], *parts[end:]])
        return module

    def _originals(self, module: str) -> dict[str, Tensor]:
        """The base's values of a module that is trained whole."""
        found = {}
        for inner, own in named_modules(self._model.get_submodule(module)):
            undo = note(own)
            for local, tensor in own.state_dict(keep_vars=True).items():
                if "." not in local:
                    before = undo.trained.get(local, tensor) if undo is not None and not undo.swapped else tensor
                    name = f"{inner}.{local}".removeprefix(".")
                    found[f"{module}.original_module.{name}"] = before
        return found


def _whole(bank: Bank, name: str) -> Iterator[str]:
    """The modules that an adapter trains whole."""
    for module, _, undo, _ in bank.adaptation(name).noted():
        if undo.whole:
            yield module


def _with_rows(bank: Bank, name: str) -> Iterator[tuple[str, TrainedRows]]:
    """The modules that compute with an adapter's trained rows, each with the table that holds them."""
    names = {id(module): own for own, module in named_modules(bank.model)}
    for table, rows in bank.adaptation(name).tables().items():
        yield table, rows
        for tied in rows.ties:
            yield names[id(tied)], rows


def _update(layer: AdaptedLayer) -> Update:
    """What `places` asks for, without a copy of any tensor."""
    parameter = layer.parameter if isinstance(layer, AdaptedParameter) else ""
    return Update(
        layer.layout, layer.lora_A, layer.lora_B, layer.r, layer.lora_alpha, layer.rslora, parameter=parameter
    )


def _as_parameter(tensor: Tensor) -> Tensor:
    """A tensor kept while its adapter is off, as a parameter that shares its memory."""
    if isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
        return tensor
    return nn.Parameter(tensor, requires_grad=False)


def tree(named: Iterable[tuple[str, nn.Parameter]]) -> nn.Module:
    """Modules without any function that hold these parameters under these names."""
    root = nn.Module()
    for name, parameter in named:
        *path, local = name.split(".")
        module = root
        for part in path:
            module = module._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        module._parameters[local] = parameter
    return root


def copy_into(named: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Copy the given tensors to those of the same names. Returns names missing, names unexpected, and misfits."""
    misfits = []
    with torch.no_grad():
        for name, value in given.items():
            own = named.get(name)
            if isinstance(own, Tensor) and own.shape != value.shape:
                misfits.append(f"{name}: shape {tuple(value.shape)}, the model has {tuple(own.shape)}")
            elif isinstance(own, Tensor):
                own.copy_(value)
    return [name for name in named if name not in given], [name for name in given if name not in named], misfits
