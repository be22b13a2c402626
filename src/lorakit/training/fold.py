"""An adapter folded into the tensors of its base's files: what changes, and the tensors that take their place.

The adapter is put into the model on the meta device, so all that `lorakit.insert` checks is checked, and each update is
merged by its own layer: for that time the layer holds the weight that was read, and the numbers are those of a merge in
memory, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapted import AdaptedLayer
from ..core.adapter import Adapter, Update
from ..core.attach import factor_dtype
from ..core.beside import AddsBeside
from ..core.errors import LoraError
from ..core.exchange import insert
from ..core.format import format_of
from ..core.layouts import Lookup
from ..core.matrix import add_product, dora_gain, precise
from ..core.parameters import AdaptedParameter, adapted_parameters
from ..formats.shards import Entry
from .merge_check import Rows, Weight, check_token_rows
from .stored import Stored, StoredHost, Unit, part_of


@dataclasses.dataclass(frozen=True)
class Folded:
    """An update, the layer of the model that it belongs to, and how its weight is stored."""

    layer: AdaptedLayer
    update: Update

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored as (in, out)."""
        said = getattr(self.layer, "fan_in_fan_out", False) or getattr(self.layer, "transposed", False)
        return said or isinstance(self.update.layout, Lookup)


class Fold:
    """What an adapter changes in the files of its base.

    updates: by the name of the weight. values: tensors that are replaced as a whole, by their name. rows: those of
    token tables that are replaced, by the name of each parameter that holds them. untied: parameters that the model
    ties, and that are different ones now.
    """

    def __init__(self, stored: Stored, adapter: Adapter | str | Path) -> None:
        """Raises LoraError for an adapter that does not fit the model, or a part of it that no file has a place for."""
        self.stored = stored
        where = "the adapter" if isinstance(adapter, Adapter) else str(adapter)
        host = StoredHost(stored)
        try:
            if not isinstance(adapter, Adapter):
                adapter = format_of(adapter, None).read(Path(adapter), host, None)
            heads = _embeddings(stored)
            self._refuse_other_vocabulary(adapter, heads)
            adapter = self._without_ties(adapter)
            insert(stored.model, adapter)
        except ValueError as error:
            raise LoraError(f"{where}: {error}") from None
        self.updates: dict[str, Folded] = {}
        for name, update in adapter.updates.items():
            layer = _layer_of(name, host)
            weight = _weight_name(name, layer)
            self._refuse_unmergeable(weight, layer)
            self.updates[stored.names[weight]] = Folded(layer, update)
        self.values = {stored.names[name]: value for name, value in adapter.trained.items()}
        self.rows = {own: rows for name, rows in adapter.token_rows.items() for own in self._tie_of(f"{name}.weight")}
        self.untied = self._untied(heads)
        self._refuse_homeless()

    @property
    def changed(self) -> set[str]:
        """The parameters that differ from the base's."""
        return {*self.updates, *self.values, *self.rows}

    def changes(self, unit: Unit) -> bool:
        return not self.changed.isdisjoint(unit.targets)

    def tensors(self, unit: Unit, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """The unit's tensors with the adapter in them, by their names in the files.

        dtype: that the base's are rounded to first; None: their own. Raises LoraError for what cannot be taken back.
        """
        given = {name: as_dtype(tensor, dtype) for name, tensor in self.stored.read(unit).items()}
        unit.check(given)
        parameters = unit.to_model(given)
        for name in list(parameters):
            if name in self.values:
                parameters[name] = self._value(name, unit).to(parameters[name].dtype, copy=True)
            if name in self.updates:
                own = self.updates[name]
                parameters[name] = _merged(own.layer, part_of(unit, own.update), parameters[name])
            if name in self.rows:
                values = self.rows[name].values.to(parameters[name].dtype)
                parameters[name][list(self.rows[name].tokens)] = values
        return unit.to_files(parameters)

    def check(self, unit: Unit, written: Mapping[str, Entry], dtype: torch.dtype | None) -> dict[str, bool]:
        """Compare the unit's tensors in the written files with base + adapter: for each weight, whether rows moved.

        written: the entries of the written file, by their names in the base's. Raises LoraError where they differ.
        """
        moved: dict[str, bool] = {}
        for name in self.changed.intersection(unit.targets):
            after = self._rows(unit, name, written, None)
            if name in self.rows:
                before = self._rows(unit, name, self.stored.shards.tensors, dtype)
                check_token_rows(name, self.rows[name], self.stored.shapes[name][0], before, after)
            elif name in self.updates:
                own = self.updates[name]
                before = self._rows(unit, name, self.stored.shards.tensors, dtype)
                if name in self.values:
                    before = _rows_of(self._value(name, unit).to(after(0, 1).dtype), unit)
                shape = self.stored.shapes[name] if unit.part is None else self.stored.shapes[name][1:]
                moved[name] = Weight(name, own.update, shape, own.transposed, unit.part).check(before, after)
            elif not torch.equal(found := unit.to_model(_read(unit, written))[name], self._value(name, unit).to(found)):
                raise LoraError(f"{name}: the file does not hold what was trained. Nothing was put in place.")
        return moved

    def _rows(self, unit: Unit, name: str, entries: Mapping[str, Entry], dtype: torch.dtype | None) -> Rows:
        """The rows of a parameter as these files hold it, in another dtype."""
        if unit.rule is None:
            entry = entries[unit.names[0]]
            return lambda first, count: as_dtype(entry.read_rows(first, count), dtype)
        return _rows_of(as_dtype(unit.to_model(_read(unit, entries))[name], dtype), unit)

    def _value(self, name: str, unit: Unit) -> Tensor:
        """What takes the place of the unit's part of a parameter."""
        value = self.values[name]
        return value if unit.part is None else value[unit.part : unit.part + 1]

    def _tie_of(self, name: str) -> frozenset[str]:
        """The names of the parameters that are this one: files hold one of them."""
        own = self.stored.names[name]
        return next((tie for tie in self.stored.ties if own in tie), frozenset({own}))

    def _refuse_other_vocabulary(self, adapter: Adapter, heads: frozenset[str]) -> None:
        """Rows of new tokens are drawn at random where the adapter does not bring them, so a model must make them."""
        found = {name: len(value) for name, value in adapter.trained.items() if name in heads}
        for name, update in adapter.updates.items():
            if isinstance(update.layout, Lookup):
                found[f"{name}.weight"] = update.A.shape[1]
        for name, token_rows in adapter.token_rows.items():
            own = self.stored.shapes.get(f"{name}.weight")
            if own is not None and token_rows.tokens[-1] >= own[0]:
                raise LoraError(
                    f"row {token_rows.tokens[-1]} of {name}.weight was trained, and the base's files have {own[0]} "
                    "rows: tokens were added. Merge in memory: lorakit merge without --shard-by-shard."
                )
        for name, rows in found.items():
            own = self.stored.shapes.get(name)
            if own is not None and own[0] != rows:
                raise LoraError(
                    f"{name} has {rows} rows, one for each token, and the model has {own[0]}: the vocabulary was "
                    f"resized. Merge in memory: model.resize_token_embeddings({rows}), lorakit.load, lorakit.bake."
                )

    def _without_ties(self, adapter: Adapter) -> Adapter:
        """The adapter without values that are the base's own: PEFT saves the table of an embedding that it adapts.

        Raises LoraError for another value of one of two tied parameters, none of which is trained whole.
        """
        own = tuple(f"{module}." for module in adapter.also_train)
        trained = dict(adapter.trained)
        for tie in self.stored.ties:
            given = [name for name in trained if self.stored.names.get(name) in tie and not name.startswith(own)]
            if len(given) in (0, len(tie)):
                continue
            present = next((weight for name in tie if (weight := self.stored.parameter(name)) is not None), None)
            for name in given:
                if present is not None and torch.equal(trained[name].to(present), present):
                    del trained[name]
                    continue
                others = ", ".join(sorted(tie - {self.stored.names[name]}))
                raise LoraError(
                    f"{name} has a value of its own, and in the model it is tied to {others}. Untie it in memory and "
                    "merge there (lorakit.load says how)."
                )
        return dataclasses.replace(adapter, trained=trained)

    def _untied(self, heads: frozenset[str]) -> frozenset[str]:
        untied: set[str] = set()
        for tie in self.stored.ties:
            if changed := tie & (self.changed - self.rows.keys()):
                if not tie <= heads:
                    name = min(changed)
                    others = ", ".join(sorted(tie - {name}))
                    raise LoraError(
                        f"{name} is tied to {others}, and no setting of the model unties these, so a merge of one "
                        "would be undone when the files are loaded. Use the adapter unmerged."
                    )
                untied |= tie
        return frozenset(untied)

    def _refuse_homeless(self) -> None:
        stored = self.stored
        if lost := sorted(self.updates.keys() - stored.units_for.keys() - self.untied):
            raise LoraError(
                f"{stored.shards.folder} holds no tensor of {lost[0]}, which the adapter updates"
                + (f", nor of {len(lost) - 1} more." if len(lost) > 1 else ".")
            )
        ignored = stored.model._keys_to_ignore_on_load_missing or ()
        missing = [name for name in stored.missing() if name not in self.values and not matches(ignored, name)]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise LoraError(
                f"{stored.shards.folder} holds no weights for {missing[0]}{more}, and the adapter brings none."
            )
        for unit in stored.units:
            entry = stored.shards.tensors[unit.names[0]]
            name = unit.targets[0]
            if unit.rule is None and entry.shape != stored.shapes[name] and name not in self.values:
                raise LoraError(
                    f"{entry.path}: {unit.names[0]} has the shape {entry.shape}, the model has {stored.shapes[name]}."
                )

    def _refuse_unmergeable(self, name: str, layer: AdaptedLayer) -> None:
        """A layer of another class is tried with its weight: only then it is known whether it uses that as it is."""
        if not isinstance(layer, AddsBeside):
            return
        if name in self.stored.names:
            weight = self.stored.parameter(name)
            if weight is None:
                return  # `_refuse_homeless` says so
            with _holding(layer, weight):
                reason = layer.merge_refusal()
        else:
            reason = layer.merge_refusal()  # its weight is computed
        if reason:
            raise LoraError(f"{name} cannot be merged: {reason}. Leave the adapter unmerged.")


def _read(unit: Unit, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    return {name: entries[name].read() for name in unit.names}


def _rows_of(whole: Tensor, unit: Unit) -> Rows:
    """Those of a parameter; of the expert's matrix where it is a part of a stack."""
    weight = whole if unit.part is None else whole[0]
    return lambda first, count: weight[first : first + count]


def as_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """In another dtype, where it is a tensor of floating point."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def _merged(layer: AdaptedLayer, update: Update, weight: Tensor) -> Tensor:
    """g ⊙ (W + s·ΔW), written on the weight itself: the bits of `AdaptedLayer.merge`, which needs a second weight."""
    with torch.no_grad(), _holding(layer, weight):
        layer.take_update(update, factor_dtype(weight))
        if update.magnitude is None:
            product = layer.as_product(weight)
            add_product(product, product, *layer._factor_matrices(), layer.scaling)
            return weight
        total = layer.matrix(precise(weight))
        total += layer._dense().mul_(layer.scaling)
        total *= dora_gain(layer.lora_magnitude, torch.linalg.vector_norm(total, dim=1))[:, None]
        return weight.copy_(layer.from_matrix(total))


@contextlib.contextmanager
def _holding(layer: AdaptedLayer, weight: Tensor) -> Iterator[None]:
    """Inside, the layer, which is on the meta device, holds this weight."""
    owner, local = (layer.owner, layer.parameter) if isinstance(layer, AdaptedParameter) else (layer, "weight")
    parameters = dict(owner._parameters), dict(layer._parameters)
    owner._parameters[local] = nn.Parameter(weight, requires_grad=False)
    try:
        yield
    finally:
        for module, before in zip((owner, layer), parameters, strict=True):
            module._parameters.update(before)


def _layer_of(name: str, host: StoredHost) -> AdaptedLayer:
    """The layer, or the adapted parameter, of an update of this name."""
    module = host.modules.get(name)
    if isinstance(module, AdaptedLayer):
        return module
    owner, _, local = name.rpartition(".")
    return adapted_parameters(host.modules[owner])[local] if module is None else adapted_parameters(module)["weight"]


def _weight_name(name: str, layer: AdaptedLayer) -> str:
    """The name of the weight of an adapted layer of this name, or of the parameter itself."""
    if isinstance(layer, AdaptedParameter) and f".{name}".endswith(f".{layer.parameter}"):
        return name
    return f"{name}.weight"


def _embeddings(stored: Stored) -> frozenset[str]:
    """The weights that `tie_word_embeddings` ties or unties; none of a model that reads no words."""
    own = set()
    with contextlib.suppress(NotImplementedError):
        own = {id(stored.model.get_input_embeddings()), id(stored.model.get_output_embeddings())}
    tables = [name for name, module in stored.model.named_modules() if id(module) in own]
    return frozenset(stored.names[f"{name}.weight"] for name in tables)


def matches(patterns: Any, name: str) -> bool:
    """Whether one of transformers' regular expressions is found in the name."""
    return any(re.search(pattern, name) for pattern in patterns)
