"""Which tensors a merge writes into which file, and what each is made of. Making the plan refuses all that can be.

The files and their tensors are the base's, in its order. What a base does not hold is added to the last file: a head
that was trained, the second of two parameters that were tied.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.errors import LoraError
from ..formats.shards import CODES, Entry, Planned, ShardWriter, shards_of, total_size
from .adapter_folder import adapter_config, is_adapter
from .fold import Fold, matches
from .models import structure
from .stored import Stored, Unit
from .task import Task, model_task


@dataclass(frozen=True)
class Output:
    """A tensor of a file that is written.

    source: its name in the base's files. unit: what it is computed with; None: it is the base's, or `value`.
    """

    planned: Planned
    source: str = ""
    unit: Unit | None = None
    value: Tensor | None = None


class MergePlan:
    """Every file and tensor that will be written. Making it raises all that can be refused."""

    def __init__(self, folder: Path, adapter: Adapter | Path, dtype: torch.dtype | None) -> None:
        self.folder, self.adapter = folder, adapter
        self.shards = shards_of(folder)
        self.task = _task(folder, adapter)
        labels = None if self.task.answers else self.task.labels
        speaks = _task_type(adapter) == "CAUSAL_LM"
        several, named = self.task.several, self.task.named
        self.model = structure(str(folder), labels=labels, multi_label=several, named=named, speaks=speaks)
        self.stored = Stored(self.model, self.shards)
        self.fold = Fold(self.stored, adapter)
        self.dtype = dtype
        self._wide = self.model._get_dtype_plan(self.dtype) if self.dtype is not None else {}
        self.outputs = {file: self._outputs(file) for file in self.shards.files}
        self.outputs[self.shards.files[-1]] |= self._added()

    @property
    def files(self) -> list[str]:
        """The names of the safetensors files."""
        return list(self.outputs)

    def dtype_of(self, unit: Unit) -> torch.dtype | None:
        """The dtype that was asked for, or the one that transformers keeps a weight in nevertheless."""
        return self._asked(unit.targets[0])

    def tensors(self, file: str) -> dict[str, Planned]:
        """The tensors of a file, in the order in which they are written."""
        return ShardWriter.in_order({name: output.planned for name, output in self.outputs[file].items()})

    def index(self) -> dict[str, Any]:
        """What the index of several files says."""
        homes = {name: file for file, own in self.outputs.items() for name in own}
        planned = [output.planned for own in self.outputs.values() for output in own.values()]
        said = dict(self.shards.index or {})
        metadata = dict(said.get("metadata") or {}) | {"total_size": total_size(planned)}
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(torch.Size(own.shape).numel() for own in planned)
        return said | {"metadata": metadata, "weight_map": dict(sorted(homes.items()))}

    def _outputs(self, file: str) -> dict[str, Output]:
        return {name: self._output(name, self.shards.tensors[name]) for name in self.shards.inside(file)}

    def _output(self, name: str, entry: Entry) -> Output:
        unit = self.stored.unit_of.get(name)
        like = self._planned(entry, self._asked(unit.targets[0] if unit else name))
        if unit is None or not self.fold.changes(unit):
            return Output(like, name)
        value = self.fold.values.get(unit.targets[0]) if unit.rule is None else None
        return Output(like if value is None else Planned(like.dtype, tuple(value.shape)), name, unit)

    def _added(self) -> dict[str, Output]:
        """What the base's files do not hold: the second of two parameters that were tied, a head that was trained."""
        added: dict[str, Output] = {}
        values = self.fold.values.keys() - self.fold.updates.keys()
        for name in sorted(self.fold.untied - self.stored.units_for.keys() - values):
            tie = next(tie for tie in self.stored.ties if name in tie)
            source = next(unit for own in tie for unit in self.stored.units_for.get(own, ()))
            if source.rule is not None:
                raise LoraError(f"{name} is tied to {source.targets[0]}, which is converted. Merge in memory instead.")
            unit = Unit(source.sources, (name,))
            entry = self.shards.tensors[unit.names[0]]
            added[name] = Output(self._planned(entry, self._asked(name)), unit.names[0], unit)
        for name, value in self.fold.values.items():
            if name not in self.stored.units_for and name not in added:
                own = self._asked(name) or self._base_dtype()
                value = value.to(own) if value.is_floating_point() else value
                added[name] = Output(Planned.of(value), value=value.contiguous())
        for name in added:
            if self.stored.name_of(name) != name:
                raise LoraError(f"{name} is not in the base's files, and has another name there. Merge in memory.")
        return added

    def _planned(self, entry: Entry, asked: torch.dtype | None) -> Planned:
        floating = entry.torch_dtype is not None and entry.torch_dtype.is_floating_point
        return Planned(CODES[asked] if asked is not None and floating else entry.dtype, entry.shape)

    def _asked(self, name: str) -> torch.dtype | None:
        if self.dtype is not None and matches([rf"(^|\.)({own})(\.|$)" for own in self._wide], name):
            return torch.float32
        return self.dtype

    def _base_dtype(self) -> torch.dtype:
        said = getattr(self.model.config, "dtype", None)
        if isinstance(said, torch.dtype):
            return said
        dtypes = (entry.torch_dtype for entry in self.shards.tensors.values())
        return next(dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point)


def _task_type(adapter: Adapter | Path) -> str | None:
    """PEFT's word for what the adapter was trained for, where it says so."""
    if isinstance(adapter, Adapter):
        return adapter.task_type
    return adapter_config(str(adapter)).get("task_type") if is_adapter(adapter) else None


def _task(folder: Path, adapter: Adapter | Path) -> Task:
    """What the merged model is for. The classes of a classifier are told by the adapter's folder."""
    told = not isinstance(adapter, Adapter) and is_adapter(adapter)
    if told and _task_type(adapter) in (None, "CAUSAL_LM", "SEQ_CLS"):
        return model_task(str(folder), str(adapter))
    return model_task(str(folder), None)
