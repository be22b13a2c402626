"""PEFT's names for the updates of parameters. lorakit names the parameter; PEFT wraps the module that owns it.

lorakit                                    PEFT
X.in_proj_weight with X.out_proj           X                           a layer for the whole attention, X in
  of nn.MultiheadAttention                 X.base_layer.out_proj       target_modules
X.experts.gate_up_proj                     X.experts.base_layer        a wrapper for each parameter, the first one
X.experts.down_proj                        X.experts                   innermost; names in target_parameters
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..core.adapter import Update
from ..core.errors import LoraError
from ..core.targets import is_glob, matching

_BASE = ".base_layer"
_IN, _OUT = "in_proj_weight", "out_proj"


class Place(NamedTuple):
    """Where PEFT keeps an update."""

    path: str  # its tensors are <path>.lora_A.weight, …
    key: str  # its name for the patterns of the configuration
    target: str  # the configuration's list that names it: target_modules, target_parameters, or none


def places(updates: Mapping[str, Update]) -> dict[str, Place]:
    """The place of each update. Raises LoraError for attention's out_proj alone, which PEFT cannot adapt."""
    owners: dict[str, list[str]] = {}  # in the order of the model's parameters, as `updates` is
    found: dict[str, Place] = {}
    for name, update in updates.items():
        owner, _, local = name.rpartition(".")
        attention = f"{owner}.{_IN}" if owner else _IN
        if local == _IN and _join(owner, _OUT) in updates:
            found[name] = Place(owner, owner, "target_modules")
        elif local == _OUT and attention in updates:
            if updates[attention].rank != update.rank or updates[attention].scale != update.scale:
                raise LoraError(f"{name} and {attention}: PEFT's folder holds one rank and alpha for an attention.")
            found[name] = Place(f"{owner}{_BASE}.{_OUT}", owner, "")
        elif local == _OUT and update.parameter:
            raise LoraError(f"{name}: PEFT adapts an attention's {_OUT} with its {_IN} only, which is not adapted.")
        elif not owner and update.parameter:
            raise LoraError(f"{name}: PEFT cannot adapt a parameter of the whole model.")
        elif update.parameter and update.parameter == local:
            owners.setdefault(owner, []).append(name)
        else:
            found[name] = Place(name, name, "target_modules")
    for owner, names in owners.items():
        for depth, name in enumerate(reversed(names)):
            found[name] = Place(owner + _BASE * depth, name, "target_parameters")
    return {name: found[name] for name in updates}


def wrapped(where: Mapping[str, Place]) -> dict[str, str]:
    """The modules that have PEFT's layers around them, and their paths inside these, where their biases are."""
    inside: dict[str, str] = {}
    for place in where.values():
        module = place.path.replace(_BASE, "")
        inside[module] = max(inside.get(module, ""), place.path + _BASE, key=len)
    return inside


def target_names(list_name: str, where: Mapping[str, Place], shortest: Sequence[str]) -> list[str] | str:
    """The configuration's list of this name, or a regular expression if no list of name endings selects only these.

    shortest: name endings and globs that select the updates by lorakit's names.
    """
    keys = {name: place.key for name, place in where.items() if place.target == list_name}
    same = [name for name, key in keys.items() if name == key]
    short: set[str] = set()
    exact: set[str] = set()
    for target in shortest:
        hits = matching(target, same)
        # "experts.gate_up_proj" rather than "gate_up_proj": a reader without the model then knows the module.
        alone = list_name == "target_parameters" and "." not in target
        if is_glob(target):
            exact |= set(hits)
        else:
            short |= {".".join(hit.split(".")[-2:]) for hit in hits} if alone else {target} if hits else set()
    ends = {*(short if short or exact else same), *(key for name, key in keys.items() if name != key)}
    if exact and list_name == "target_modules":
        return "|".join([*map(re.escape, sorted(exact)), *(rf"(.*\.)?{re.escape(end)}" for end in sorted(ends))])
    return sorted(ends | exact)


@dataclass(frozen=True)
class Names:
    """Translates PEFT's paths back to lorakit's names."""

    targeted: Sequence[str]  # the configuration's target_parameters
    parameters: Mapping[str, tuple[str, ...]] | None  # the matrices of each module of the model, in its order

    def name_and_key(self, path: str) -> tuple[str, str]:
        """lorakit's name of the update at `path`, and the name in PEFT's patterns."""
        outer, base, inner = path.partition(f"{_BASE}.{_OUT}")
        if base and not inner:
            return f"{outer}.{_OUT}", outer
        owner = re.sub(rf"(\{_BASE})+$", "", path)
        depth = (len(path) - len(owner)) // len(_BASE)
        wrapped = self._wrapped(owner)
        if depth < len(wrapped):
            name = _join(owner, wrapped[-1 - depth])
            return name, name
        if self.parameters and _IN in self.parameters.get(owner, ()):
            return _join(owner, _IN), owner
        return path, path

    def _wrapped(self, owner: str) -> list[str]:
        """The adapted parameters of a module, the innermost first."""
        if self.parameters is not None:
            own = [_join(owner, local) for local in self.parameters.get(owner, ())]
            return [
                name.rpartition(".")[2] for name in own if any(matching(target, [name]) for target in self.targeted)
            ]
        split = (target.rpartition(".") for target in self.targeted)
        return [local for module, _, local in split if module and matching(module, [owner])]


def without_peft_wrappers(path: str) -> str:
    """A parameter's name in the plain model, from its name under PEFT's wrappers."""
    return re.sub(r"(\.base_layer)+(?=\.)", "", path).replace(".modules_to_save.", ".")


def _join(owner: str, local: str) -> str:
    return f"{owner}.{local}" if owner else local
