"""The tensors of a model that a checkpoint has to hold: all but the frozen base's, under their names in the model.

An adapter's file is for other programs, and it need not have the parameters that the optimizer trains: PiSSA's has
twice the rank, for example. To go on exactly where a run stopped, these parameters are needed themselves.

Below a model that was given to `attach` or `load`, these are kept: the adapter, whatever else is trained, and
statistics that move. Of a tied weight only the first name is kept. Outside such a model everything is kept, for example
a head that belongs to the program around it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .adapted import AdaptedLayer
from .attach import adapted_layers, trained_whole
from .errors import LoraError
from .names import named_modules, unwrapped, unwrapped_name
from .record import is_statistic
from .statistics import FrozenStatistics, persistent_buffers
from .trainable import lora_names
from .undo import is_adapted_root


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training changes, or needs in order to resume, by its name in the plain model: no copies."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    present = {unwrapped_name(name): tensor for name, tensor in unwrapped(model).state_dict(keep_vars=True).items()}
    for name in without_base(model, present):
        tensor = present[name]
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor.detach().contiguous()
    return kept


def take_trained_state(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put the tensors of `trained_state` back, in place. where: what they were read from, for the message.

    Raises LoraError for tensors of other names or shapes, before anything is changed.
    """
    expected = trained_state(model)
    differing = sorted(state.keys() ^ expected.keys()) or [
        name for name in state if state[name].shape != expected[name].shape
    ]
    if differing:
        raise LoraError(f"{where} belongs to an adapter of other settings; {differing[0]} differs.")
    plain = unwrapped(model)
    as_stored = {unwrapped_name(name): name for name in plain.state_dict()}
    plain.load_state_dict({as_stored[name]: tensor for name, tensor in state.items()}, strict=False)


def without_base(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of `model` without the tensors of its frozen base."""
    model = unwrapped(model)
    roots = tuple(f"{name}." if name else "" for name, module in named_modules(model) if is_adapted_root(module))
    kept = lora_names(model) | set(trained_whole(model)[0])
    for prefix, module in named_modules(model, remove_duplicate=False):
        own = [
            name for name, parameter in module._parameters.items() if parameter is not None and parameter.requires_grad
        ]
        if not isinstance(module, FrozenStatistics | AdaptedLayer):
            own += [name for name, buffer in persistent_buffers(module).items() if is_statistic(buffer)]
        kept |= {f"{prefix}.{name}" if prefix else name for name in own}
    return {
        name: value
        for name, value in state.items()
        if (plain := unwrapped_name(name)) in kept or not plain.startswith(roots)
    }


def refuse_unadapted(model: nn.Module) -> None:
    """Raise LoraError for a model without an adapter, whose checkpoints could not leave out a base."""
    if not adapted_layers(model) and not trained_whole(model)[0]:
        raise LoraError(f"{type(model).__name__} has no adapter. Call lorakit.attach or lorakit.load before training.")
