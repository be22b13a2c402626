"""Which tensors of a base's files become which of the model's parameters, and the way back.

A file's names are often not the model's: a prefix is missing, modules were renamed, the matrices of experts lie one by
one where the model has a stack. transformers reads such files by rules (`formats/renamed.py`), whose operations it can
reverse; they are applied here to as few tensors as go together:

    a weight of its own     one tensor                      ↔  one parameter
    chunked                 one tensor (q, k and v)         ↔  several parameters
    concatenated            several tensors                 ↔  one parameter
    merged                  the tensors of expert e         ↔  the part [e : e + 1] of a stack

The model is on the meta device: it has names and shapes and holds no memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.errors import LoraError
from ..core.host import Host
from ..core.kinds import layer_class
from ..core.layers import Linear, is_transposed
from ..formats.renamed import in_order, renaming
from ..formats.shards import Entry, Shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Unit:
    """Tensors of the files that become parameters of the model together.

    sources: the tensors, by the pattern of the rule that each matches; without a rule one, under "". targets: the
    parameters. part: which expert of the stack; None for whole parameters.
    """

    sources: Mapping[str, tuple[str, ...]]
    targets: tuple[str, ...]
    rule: Any = None
    model: Any = None
    part: int | None = None

    @property
    def names(self) -> list[str]:
        """Of the tensors in the files."""
        return [name for names in self.sources.values() for name in names]

    def to_model(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters that these tensors, by their names in the files, become; of a stack a part of size 1."""
        if self.rule is None:
            return {self.targets[0]: tensors[self.names[0]]}
        given = {pattern: [tensors[name] for name in names] for pattern, names in self.sources.items()}
        found = self._converted(self.rule, given)
        return {target: found[pattern] for target, pattern in zip(self.targets, self.rule.target_patterns, strict=True)}

    def to_files(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, by their names in the files, that these parameters are stored as."""
        if self.rule is None:
            return {self.names[0]: parameters[self.targets[0]]}
        back = self.rule.reverse_transform()
        given = {
            pattern: [parameters[target]] for target, pattern in zip(self.targets, back.source_patterns, strict=True)
        }
        found = self._converted(back, given)
        stored: dict[str, Tensor] = {}
        for pattern, own in zip(back.target_patterns, self.rule.source_patterns, strict=True):
            for number, name in enumerate(self.sources.get(own, ())):
                tensor = found[pattern.replace("*", str(number))]
                stored[name] = tensor[0] if isinstance(tensor, list) else tensor
        return stored

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise LoraError where the way to the model and back does not give the same tensors."""
        if self.rule is None:
            return
        try:
            # Operations let go of what they are given, and some give views: the parameters are no view of the tensors.
            back = self.to_files({name: tensor.clone() for name, tensor in self.to_model(tensors).items()})
            same = all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
        except Exception as error:  # whatever an operation raises that was not made for a part
            raise self._refused(f"{type(error).__name__}: {error}") from None
        if not same:
            raise self._refused("the way back gives other numbers")

    def _converted(self, rule: Any, given: dict[str, Any]) -> dict[str, Any]:
        for operation in rule.operations:
            given = operation.convert(
                given,
                source_patterns=rule.source_patterns,
                target_patterns=rule.target_patterns,
                full_layer_name=self.targets[0],
                model=self.model,
                config=self.model.config,
                missing_keys=None,
            )
        return given

    def _refused(self, reason: str) -> LoraError:
        operations = ", ".join(type(operation).__name__ for operation in self.rule.operations)
        return LoraError(
            f"{self.names[0]}: transformers makes {self.targets[0]} of it by {operations}, which cannot be taken back "
            f"part by part ({reason}). Merge in memory instead (lorakit merge without --shard-by-shard)."
        )


class Stored:
    """The files of a base, seen by the names of the model that they are for.

    model: on the meta device and not adapted yet. names: the first name of each parameter and buffer of the state dict,
    by all its names (a shared module has several). ties: the first names of what is one parameter in several modules.
    """

    def __init__(self, model: PreTrainedModel, shards: Shards) -> None:
        self.model, self.shards = model, shards
        self.names = _first_names(model)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(model)}
        self._parameters = {self.names[name] for name, _ in model.named_parameters(remove_duplicate=False)}
        self.ties = _ties(model, self.names)
        self._rules = renaming(model)
        self.units = list(self._units())
        self.unit_of = {name: unit for unit in self.units for name in unit.names}
        self.units_for: dict[str, list[Unit]] = {}
        for unit in self.units:
            for target in unit.targets:
                self.units_for.setdefault(target, []).append(unit)

    def name_of(self, stored: str) -> str:
        """The model's name of a tensor of this name in a file."""
        assert self._rules is not None, "a model of transformers"
        renamed = self._rules[0](stored)[0]
        return self.names.get(renamed, renamed)

    def missing(self) -> list[str]:
        """The parameters that no file holds, nor another parameter that they are tied to."""
        tied = {name for tie in self.ties if any(name in self.units_for for name in tie) for name in tie}
        return sorted(self._parameters - self.units_for.keys() - tied)

    def read(self, unit: Unit) -> dict[str, Tensor]:
        """The unit's tensors, by their names in the files."""
        return {name: self._entry(name).read() for name in unit.names}

    def parameter(self, name: str) -> Tensor | None:
        """A whole parameter, in memory of its own. None for one that no file holds by itself."""
        units = self.units_for.get(self.names.get(name, name), [])
        if len(units) != 1 or units[0].part is not None:
            return None
        return units[0].to_model(self.read(units[0]))[self.names[name]]

    def _entry(self, name: str) -> Entry:
        entry = self.shards.tensors[name]
        if entry.torch_dtype is None:
            raise LoraError(
                f"{entry.path}: {name} is stored as {entry.dtype}, so the base is quantised. Merge into the base in "
                "plain weights (bfloat16, float16, float32)."
            )
        return entry

    def _units(self) -> Iterator[Unit]:
        fused: dict[tuple[str, int], dict[str, list[str]]] = {}
        rules: dict[int, Any] = {}
        if self._rules is None:
            raise LoraError(f"{type(self.model).__name__} is no model of transformers.")
        rename, by_pattern = self._rules
        for stored in sorted(self.shards.tensors, key=in_order):
            name, _, pattern = rename(stored)
            name = self.names.get(name, name)
            if pattern is not None:
                rule = by_pattern[pattern]
                rules[id(rule)] = rule
                fused.setdefault((name, id(rule)), {}).setdefault(pattern, []).append(stored)
            elif name in self.shapes:
                yield Unit({"": (stored,)}, (name,))
        for (name, number), sources in fused.items():
            yield from self._fused(name, sources, rules[number])

    def _fused(self, name: str, sources: Mapping[str, list[str]], rule: Any) -> Iterator[Unit]:
        first, *more = rule.target_patterns
        targets = tuple(self.names.get(own, own) for own in (name, *(name.replace(first, other) for other in more)))
        if not any(target in self.shapes for target in targets):
            return  # of a module that the model lacks
        kinds = [type(operation).__name__ for operation in rule.operations]
        counts = {len(names) for names in sources.values()}
        if kinds[0] == "MergeModulelist" and rule.operations[0].dim == 0 and len(counts) == 1:
            for part in range(counts.pop()):
                own = {pattern: (names[part],) for pattern, names in sources.items()}
                yield Unit(own, targets, rule, self.model, part)
        else:
            whole = {pattern: tuple(names) for pattern, names in sources.items()}
            yield Unit(whole, targets, rule, self.model)


class StoredHost(Host):
    """What a format asks of a model whose weights are in files: `weight` reads the one that is asked for."""

    def __init__(self, stored: Stored) -> None:
        super().__init__(stored.model)
        self._stored = stored

    def weight(self, name: str) -> Tensor | None:
        module = self.modules.get(name)
        if module is None or not issubclass(layer_class(module) or nn.Module, Linear):
            return None
        weight = self._stored.parameter(f"{name}.weight")
        return weight.T if weight is not None and is_transposed(type(module)) else weight


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and the buffers that the state dict holds, under each of their names."""
    stored = model.state_dict(keep_vars=True).keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, parameter
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in stored:
            yield name, buffer


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each name → the first name of the same tensor of the same module."""
    slots: dict[tuple[int, str], str] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[str, str] = {}
    for name, _ in _tensors(model):
        owner, _, local = name.rpartition(".")
        names[name] = slots.setdefault((id(modules[owner]), local), name)
    return names


def _ties(model: nn.Module, names: Mapping[str, str]) -> list[frozenset[str]]:
    held: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        held.setdefault(id(parameter), set()).add(names[name])
    return [frozenset(own) for own in held.values() if len(own) > 1]


def part_of(unit: Unit, update: Any) -> Any:
    """The update of the unit's expert, of an update of all experts."""
    if unit.part is None:
        return update
    own = slice(unit.part, unit.part + 1)
    return dataclasses.replace(update, A=update.A[own], B=update.B[own])
