"""`Bank`: several adapters on one model, of which one is used, or a sum of some, or another one for each row."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..core.adapted import AdaptedLayer
from ..core.adapter import Adapter
from ..core.attach import adapted_layers, attach, choose_trainable
from ..core.combine import combine
from ..core.errors import LoraError
from ..core.exchange import extract, insert
from ..core.joined import joined
from ..core.names import unwrapped
from ..core.parameters import AdaptedParameter
from ..core.quantised import working_like
from ..core.settings import LoRASettings
from ..core.undo import change_class, note
from ..core.unused import refuse_silent
from ..core.words import suggestion
from ..formats import read_for
from .adaptation import Adaptation
from .rows import Groups, Part, RowsLayer, Writes, rows_class, rows_refusal, thin_pair, to_rank

Used = str | Mapping[str, float] | None
FIRST = "default"  # the name of an adapter that the model has already, PEFT's


class Bank(MutableMapping[str, Adapter]):
    """Adapters by name, on one model that is adapted in place.

        bank = lorakit.Bank(model)
        bank["fr"] = "adapters/fr"                      # a path, an Adapter, or LoRASettings for a new one to train
        bank["de"] = lorakit.LoRASettings("all-linear", rank=8)
        bank.use("fr")                                  # the model is adapted as by lorakit.load
        bank.use({"fr": 0.7, "de": 0.3})                # the sum of both, exactly
        bank.use(None)                                  # the base model
        with bank.rows(["fr", "de", None]):             # another adapter for each row of the batch
            model(**batch)
        bank["fr"].save("fr-again")

    The adapter in use is on the model as `attach` or `load` put it there: `merge`, `disabled`, `save` and every trainer
    work as with one adapter. The others are off the model and keep their own parameters, with which an optimizer stays
    right. The bank freezes nothing and holds no copy of the base: with `use(None)` the model is what it was.

    Adapters may differ in rank, scale, targets and kind. `rows` serves linear layers (quantised ones too), fused
    blocks, embeddings and convolutions. It refuses DoRA, parameters that are read, single experts, tensors trained
    whole, and trained rows of a token table.

    rank, room: for a model that is compiled. Room for so many adapters of so high a rank is held ready in tensors whose
    shapes never change, so other adapters, of other ranks and targets, compile nothing again (without gradients). `use`
    then takes the way of `rows` too. A layer that no adapter had before needs a new graph, once.

    An adapter that the model has already is named "default", and is in use. Raises LoraError for an unknown name, for
    what does not fit the model, and where there is no room.
    """

    def __init__(self, model: nn.Module, *, rank: int | None = None, room: int | None = None) -> None:
        for name, value in {"rank": rank, "room": room}.items():
            if value is not None and value < 1:
                raise LoraError(f"Bank({name}={value}): expected at least 1.")
        if (rank is None) != (room is None):
            raise LoraError(f"Bank(rank={rank}, room={room}): give both, or neither and it grows.")
        self.model = unwrapped(model)
        self.rank, self.room = rank, room
        self.seeds: dict[str, int] = {}
        self._adaptations: dict[str, Adaptation] = {}
        self._on: Adaptation | None = None
        self._used: Used = None
        self._entered: Sequence[str | None] = ()  # what the rows of that model are
        self._rows: Adaptation | None = None  # the model with `RowsLayer`s, for the adapters that there are
        self._refused: dict[str, str] = {}  # why an adapter cannot be one of several in a batch, found with `_rows`
        self._row_layers: dict[str, type[RowsLayer]] = {}  # by name, also of adapters that are gone
        self._slots: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # by the same names, if `rank` and `room` are given
        self._in_rows = False
        self._writes = Writes()
        _count_writes(self)
        if layers := adapted_layers(self.model):
            _refuse_constructed(layers)
            self._keep(FIRST, Adaptation(self.model))
            self.use(FIRST)

    # --- the mapping ------------------------------------------------------------------------------------------------

    def __setitem__(self, name: str, value: str | Path | Adapter | LoRASettings) -> None:
        if not isinstance(name, str) or not name:
            raise LoraError(f"{name!r} is no name for an adapter: expected a word.")
        self._refuse_in_rows()
        if self.room is not None and name not in self._adaptations and len(self) >= self.room:
            raise LoraError(f"there is no room for {name!r}: the bank holds {self.room} adapters. Delete one first.")
        before = self._used
        with self._only(None):
            if isinstance(value, LoRASettings):
                attach(self.model, value)
            else:
                insert(self.model, value if isinstance(value, Adapter) else read_for(self.model, value))
            new = Adaptation(self.model)
            if self.rank is not None:
                self._check_rank(name, new, self.rank)
        replaced = name in self._adaptations and self._uses(name)
        if replaced:
            self._switch(None)
        self._keep(name, new)
        if replaced or self.rank is not None:  # the layers for rows are others now
            self.use(before)

    def __getitem__(self, name: str) -> Adapter:
        """A copy of the adapter, as `extract` gives it."""
        with self._only(self.adaptation(name)):
            return extract(self.model)

    def __delitem__(self, name: str) -> None:
        self.adaptation(name)
        self._refuse_in_rows()
        if self._uses(name):
            self.use(None)
        del self._adaptations[name], self.seeds[name]
        self._forget_rows()
        if self.rank is not None:
            self.use(self._used)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adaptations)

    def __len__(self) -> int:
        return len(self._adaptations)

    def __contains__(self, name: object) -> bool:
        return name in self._adaptations

    def __repr__(self) -> str:
        return f"Bank({type(self.model).__name__}: {', '.join(self) or 'empty'}; in use: {self._used!r})"

    # --- what the model is -------------------------------------------------------------------------------------------

    @property
    def used(self) -> Used:
        """What `use` was told last; None once that was detached or baked."""
        self._notice()
        return self._used

    def use(self, name: Used) -> None:
        """Adapt the model by one adapter, by a weighted sum of some (see `combine`), or by none."""
        self._refuse_in_rows()
        if isinstance(name, Mapping):
            blend = combine([self[own] for own in name], list(name.values()))
            with self._only(None):
                insert(self.model, blend)
                adaptation: Adaptation | None = Adaptation(self.model)
        else:
            adaptation = None if name is None else self.adaptation(name)
        if self.rank is None or isinstance(name, Mapping):
            self._switch(adaptation)
        else:
            self._enter([name])
        self._used = dict(name) if isinstance(name, Mapping) else name

    @contextlib.contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Inside, row i of each batch is computed with the adapter names[i], None for the base model.

        The batch has a row for each name, or a multiple of them next to each other, as `generate` makes for beams and
        num_return_sequences. Gradients reach each adapter from its own rows alone; call `backward` inside if the model
        checkpoints its activations. A loss that is a mean over the batch divides by all rows; for the gradients of
        training alone add up the means of each adapter's rows. `assign` gives the next batch other adapters.
        Afterwards the model is as before.
        """
        self._refuse_in_rows()
        if not names:
            raise LoraError("bank.rows([]): expected a name, or None, for each row of the batch.")
        self._notice()
        before, on = self._used, self._on
        self._enter(names)
        self._in_rows = True
        try:
            yield self.model
            layers = {name: own for name, own in self._layers_for_rows().items() if own.lora_part is not None}
            refuse_silent(self.model, layers, "Leave them out of the adapters' targets, or use one adapter at a time.")
        finally:
            self._in_rows = False
            if self.rank is None or isinstance(before, Mapping):
                self._switch(on)
            else:
                self._enter([before])

    def assign(self, names: Sequence[str | None]) -> None:
        """Inside `rows`, give the rows of the coming batches these adapters. Does nothing if they have them already."""
        if not self._in_rows:
            raise LoraError("bank.assign is for the inside of bank.rows, which begins and ends what rows do.")
        if not names:
            raise LoraError("bank.assign([]): expected a name, or None, for each row of the batch.")
        if list(names) != list(self._entered):
            self._enter(names)

    def written(self) -> None:
        """Say that factors were written to in a way that leaves no note: `parameter.data`, a kernel of one's own.

        A step of an optimizer needs no such call.
        """
        self._writes.count += 1
        if self.rank is not None and self._on is not None and self._on is self._rows:
            self._enter(self._entered)

    def parameters(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter, for its own optimizer: its factors, and what it trains beside them."""
        return list(self.adaptation(name).parameters())

    def adaptation(self, name: str) -> Adaptation:
        """What one adapter is on the model: its layers and tensors, whether it is in use or not."""
        if name not in self._adaptations:
            known = ", ".join(map(repr, self)) or "none"
            raise LoraError(f"the bank has no adapter {name!r}, it has {known}.{suggestion(str(name), list(self))}")
        return self._adaptations[name]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _uses(self, name: str) -> bool:
        return name in self._used if isinstance(self._used, Mapping) else name == self._used

    def _keep(self, name: str, adaptation: Adaptation) -> None:
        self._adaptations[name] = adaptation
        self.seeds.setdefault(name, zlib.crc32(name.encode()))
        self._forget_rows()

    def _refuse_in_rows(self) -> None:
        if self._in_rows:
            raise LoraError("the model is inside bank.rows. Leave that first.")

    def _notice(self) -> None:
        """The adapter in use may be detached, or baked into the base, by those who know nothing of the bank."""
        if self._on is not None and not self._on.is_there():
            self._on.take_off()
            self._on = self._used = None

    def _switch(self, to: Adaptation | None) -> None:
        self._notice()
        if self._on is to:
            return
        if self._on is not None:
            self._on.take_off()
        self._on = None
        if to is not None:
            to.put_on()
        self._on = to

    @contextlib.contextmanager
    def _only(self, adaptation: Adaptation | None) -> Iterator[None]:
        """Inside, the model has this adapter, or none. Afterwards it is as before."""
        self._notice()
        before = self._on
        self._switch(adaptation)
        try:
            yield
        finally:
            self._switch(before)

    # --- rows --------------------------------------------------------------------------------------------------------

    def _forget_rows(self) -> None:
        if self._on is not None and self._on is self._rows:
            self._switch(None)
        self._rows = None

    def _enter(self, names: Sequence[str | None]) -> None:
        """Make the model one that adds the update of each row's adapter."""
        groups = Groups.of(names)
        chosen = {name: self.adaptation(name) for name in groups.names if name is not None}
        if self._rows is None:
            self._look_for_rows()
            with self._only(None):
                self._rows = self._made_for_rows()
        for name in chosen:
            if name in self._refused:
                raise LoraError(self._refused[name])
        self._switch(self._rows)
        by_name = {name: own.layers() for name, own in chosen.items()}
        for layer_name, module in self._layers_for_rows().items():
            having = [name for name in chosen if layer_name in by_name[name]]
            module.lora_part, module.was_called = None, False
            if having:
                places = {name: place for place, name in enumerate(having)}
                index = [-1 if name is None else places.get(name, -1) for name in groups.names]
                layers = [by_name[name][layer_name] for name in having]
                seeds = [self.seeds[name] for name in having]
                module.lora_part = Part(layer_name, layers, index, groups.rows, seeds, self._writes)
            if layer_name in self._slots:
                self._fill(layer_name, module, groups, {name: by_name[name][layer_name] for name in having})
        self._entered = names

    def _layers_for_rows(self) -> dict[str, RowsLayer]:
        found: dict[str, Any] = {name: self.model.get_submodule(name) for name in self._row_layers}
        return found

    def _look_for_rows(self) -> None:
        """Find the layers that can have another adapter in each row, and the adapters that have others too."""
        self._refused = {}
        for name, adaptation in self._adaptations.items():
            if trained := ", ".join(list(adaptation.trained())[:3]):
                why = f"{name!r} has tensors trained whole ({trained}), which all rows share. Use it alone."
                self._refused[name] = why
            if tables := ", ".join(adaptation.tables()):
                why = f"{name!r} has trained rows of token tables ({tables}), which all rows share. Use it alone."
                self._refused.setdefault(name, why)
            for layer_name, layer in adaptation.layers().items():
                if reason := rows_refusal(layer_name, layer, self.model):
                    why = f"{name!r} cannot be one of several in a batch: {layer_name} {reason}. Use it alone."
                    self._refused.setdefault(name, why)
                elif layer_name not in self._row_layers:
                    self._row_layers[layer_name] = rows_class(layer)
                    if self.rank is not None:
                        self._make_slots(layer_name, layer)

    def _made_for_rows(self) -> Adaptation:
        """The base model, frozen, with a `RowsLayer` for each layer that was found."""
        for layer_name, cls in self._row_layers.items():
            module = self.model.get_submodule(layer_name)
            change_class(module, joined(cls, type(module), type(module).__name__))
        choose_trainable(self.model, (), "none", freeze=True)
        return Adaptation(self.model)

    def _check_rank(self, name: str, adaptation: Adaptation, most: int) -> None:
        for layer_name, layer in adaptation.layers().items():
            rank = len(thin_pair(layer)[0]) if rows_refusal(layer_name, layer, self.model) is None else 0
            if rank > most:
                raise LoraError(f"{name!r} has rank {rank} in {layer_name}; the bank was made for rank={most}.")

    @torch.no_grad()
    def _fill(self, layer_name: str, module: RowsLayer, groups: Groups, layers: Mapping[str, AdaptedLayer]) -> None:
        """Write the factors of these adapters into the slots of one layer, and where each group finds its own."""
        A, B, index = self._slots[layer_name]
        free = len(A) - 1  # it stays zero
        places = {name: place for place, name in enumerate(layers)}
        for place, layer in enumerate(layers.values()):
            down, up = thin_pair(layer)
            A[place].copy_(to_rank(down, 0, A.shape[1]))
            B[place].copy_(to_rank(layer.scaling * up, 1, A.shape[1]))
        found = torch.tensor([places.get(name, free) if name else free for name in groups.names], device=A.device)
        if len(index) == len(found):
            index.copy_(found)  # the same tensor, as a CUDA graph needs it
        else:
            index = found
        module.lora_slots = self._slots[layer_name] = A, B, index

    def _make_slots(self, layer_name: str, layer: AdaptedLayer) -> None:
        """Room for the factors of one layer: `room` adapters of rank `rank`, and zeros for rows without one."""
        assert self.rank is not None and self.room is not None
        A, B = thin_pair(layer)
        like = working_like(self.model.get_submodule(layer_name))
        shapes = (self.room + 1, self.rank, *A.shape[1:]), (self.room + 1, len(B), self.rank, *B.shape[2:])
        down, up = (torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in shapes)
        self._slots[layer_name] = down, up, torch.zeros(1, dtype=torch.int64, device=like.device)


def _refuse_constructed(layers: Mapping[str, AdaptedLayer]) -> None:
    """Raise LoraError for layers that were made with their update, so that nothing says what they are without it."""
    for name, layer in layers.items():
        owner = layer.owner if isinstance(layer, AdaptedParameter) else layer
        undo = note(owner)
        if undo is None or undo.original_class is None:
            raise LoraError(
                f"{name!r} was made by a constructor of lorakit's, so its update cannot be taken off the model. Build "
                "the model of plain layers, and adapt it by lorakit.attach or the bank."
            )


def _count_writes(bank: Bank) -> None:
    """Tell the bank of every step of an optimizer, as long as it lives."""
    alive = weakref.ref(bank)

    def stepped(*_: object) -> None:
        own = alive()
        if own is not None:
            own.written()

    weakref.finalize(bank, register_optimizer_step_post_hook(stepped).remove)
