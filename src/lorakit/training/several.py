"""Several adapters of one base, by name: found and checked before any weight is loaded, then put into a `Bank`.

Adapters answer side by side only if they belong to one base and one task, and if a token means the same to all of them.
The rest may differ: each one is asked in its own chat template, with its own system message, cut at its own length,
as it is without the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..bank.bank import Bank, Used
from ..core.combine import combine
from ..core.errors import LoraError
from ..core.paths import expanded
from ..formats import peft, read_for
from .adapter_folder import adapters_in, base_and_adapter, base_named_by, beside
from .adapter_names import NONE, folder_name, shown_use
from .config import Quantize
from .models import Loaded, load_base, load_tokenizer, structure
from .style import Style, longest_text, trained_on
from .task import Task, model_task
from .vocabulary import grow, rows_needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class NamedAdapters:
    """A base model and the folders of its adapters, by name; none for a base alone."""

    base: str
    folders: Mapping[str, str]
    task: Task

    def folder_of(self, used: Used) -> str:
        """The folder that says how the model is asked: of a sum its first adapter's, of the base the first one's."""
        first = next(iter(self.folders.values()), self.base)
        if isinstance(used, Mapping):
            used = next(iter(used))
        return first if used is None else self.folders[used]

    def only(self, used: Sequence[Used]) -> NamedAdapters:
        """With the adapters that these need alone; for the base model, the first one, which says how it is asked."""
        names = {name for own in used for name in (own if isinstance(own, Mapping) else [own])}
        if None in names:
            names.add(next(iter(self.folders), None))
        return replace(self, folders={name: folder for name, folder in self.folders.items() if name in names})


@dataclass(frozen=True)
class Asking:
    """How a model is asked: its tokenizer, its style, and the length in tokens at which texts are cut."""

    loaded: Loaded
    style: Style
    max_length: int


class Several:
    """A loaded base and its adapters in a `Bank`, of which the first is in use."""

    def __init__(self, named: NamedAdapters, bank: Bank, loaded: Mapping[str, Loaded]) -> None:
        self.named, self.bank, self._loaded = named, bank, loaded
        self._together: dict[str, bool] = {}

    def asking(
        self, used: Used, *, system: str | None = None, plain: bool | None = None, max_length: int | None = None
    ) -> Asking:
        """How to ask what `used` names. system, plain, max_length: what is asked for instead of what is recorded."""
        folder = self.named.folder_of(used)
        loaded = self._loaded[folder]
        style = Style.recorded(folder, loaded.tokenizer, system=system, plain=plain)
        return Asking(loaded, style, max_length or longest_text(folder))

    @property
    def new_parameters(self) -> tuple[str, ...]:
        """Those of the base that its files do not hold: a new head."""
        return next(iter(self._loaded.values())).new_parameters

    def can_share(self, name: str) -> bool:
        """Whether a batch may have this adapter in some rows only (`Bank.rows`)."""
        if name not in self._together:
            model = next(iter(self._loaded.values())).model
            try:  # some reasons show only when the model runs
                with self.bank.rows([name]), torch.inference_mode():
                    model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device))
                self._together[name] = True
            except LoraError:
                self._together[name] = False
        return self._together[name]

    def notes(self, used: Sequence[Used]) -> list[str]:
        """What a reader of answers must know about how each of `used` is asked."""
        if len({id(self.asking(own).loaded.tokenizer) for own in used}) > 1:
            names = ", ".join(map(shown_use, used))
            return [f"the tokenizers or chat templates of {names} differ; each is asked in its own."]
        found = []
        for own in used:
            if isinstance(own, Mapping) and len({id(self.asking(name).loaded.tokenizer) for name in own}) > 1:
                first = next(iter(own))
                found.append(f"the tokenizers or chat templates of {', '.join(own)} differ; that of {first} is used.")
            elif isinstance(own, Mapping) and len({self.asking(name).style for name in own}) > 1:
                found.append(f"{', '.join(own)} were trained in different styles; that of {next(iter(own))} is used.")
        return found


def named_adapters(model: str | None, given: Sequence[tuple[str, str]]) -> NamedAdapters:
    """The base and the adapters that "--model MODEL --adapter NAME=PATH …" means.

    model: a base, or without `given` an adapter's folder, or the folder of a run with several; None: the base that the
    adapters name. Raises
    FileNotFoundError for what is not there, LoraError for adapters that do not go together.
    """
    if not given and model is not None and (inside := adapters_in(model)):
        return named_adapters(None, list(inside.items()))
    if not given:
        assert model is not None
        base, adapter = base_and_adapter(model, None)
        folders = {} if adapter is None else {folder_name(adapter): adapter}
    else:
        folders = _by_name(given)
        base = _common_base(folders) if model is None else model
        for folder in folders.values():
            base_and_adapter(base, folder)
    tasks = {name: model_task(base, folder) for name, folder in folders.items()}
    _refuse_unlike_tasks(tasks)
    named = NamedAdapters(base, folders, next(iter(tasks.values())) if tasks else model_task(base, None))
    if len(folders) > 1:
        _refuse_misfits(named)
    return named


def refuse_sum(named: NamedAdapters, weights: Mapping[str, float]) -> None:
    """Raise LoraError if these adapters have no weighted sum, as their files show."""
    combine([peft.stored_adapter(named.folders[name]) for name in weights], list(weights.values()))


def load_several(named: NamedAdapters, *, dtype: str = "auto", quantize: Quantize | None = None) -> Several:
    """Load the base once, and put each adapter into a bank. The first one is in use.

    quantize: None loads the base as it was loaded to train the adapters. Tokenizers are read and compared before any
    weight. Raises LoraError where they do not agree on a token, and for an adapter that does not fit the base.
    """
    tokenizers = _tokenizers(named)
    if quantize is None:
        quantize = _quantised_as(named.folders)
    first = named.folder_of(None)
    loaded = load_base(
        named.base, named.task, named.folders.values(), dtype=dtype, quantize=quantize, tokenizer=tokenizers[first]
    )
    bank = Bank(loaded.model)
    for name, folder in named.folders.items():
        adapter = read_for(loaded.model, folder)
        try:
            bank[name] = adapter
        except ValueError as error:
            raise LoraError(f"{folder}: {error}") from None
    bank.use(next(iter(named.folders), None))
    every = {folder: Loaded(loaded.model, own, loaded.new_parameters) for folder, own in tokenizers.items()}
    return Several(named, bank, every)


def _by_name(given: Sequence[tuple[str, str]]) -> dict[str, str]:
    folders: dict[str, str] = {}
    for name, folder in given:
        if name == NONE:
            raise LoraError(f"--adapter {folder}: {NONE!r} means the base model. Name it: --adapter NAME={folder}")
        if name in folders:
            raise LoraError(f"two adapters are named {name!r}: {folders[name]} and {folder}. Name them: NAME=PATH")
        folders[name] = folder
    return folders


def _common_base(folders: Mapping[str, str]) -> str:
    bases = {name: base_named_by(folder) for name, folder in folders.items()}
    (first, base), *others = bases.items()
    for name, other in others:
        if not _is_same(base, other):
            raise LoraError(
                f"the adapters are for different bases: {first} for {base}, {name} for {other}. Leave one out; if one "
                "base fits all of them, give it: --model BASE"
            )
    return base


def _is_same(one: str, other: str) -> bool:
    both = Path(expanded(one)), Path(expanded(other))
    return one == other or (all(path.exists() for path in both) and both[0].samefile(both[1]))


def _refuse_unlike_tasks(tasks: Mapping[str, Task]) -> None:
    for name, task in tasks.items():
        first, own = next(iter(tasks.items()))
        if task == own:
            continue
        why = "they have different tasks"
        if task.labels and own.labels:
            same = sorted(task.labels) == sorted(own.labels)
            why = "they have the same classes in another order" if same else "their classes differ"
        raise LoraError(
            f"{first} and {name} cannot be used together, because {why}: {first} is {own}, {name} is {task}."
        )


def _refuse_misfits(named: NamedAdapters) -> None:
    """Raise LoraError for an adapter that does not fit the base, by names and shapes alone."""
    labels = None if named.task.answers else named.task.labels
    task = named.task
    made = structure(named.base, labels=labels, multi_label=task.several, named=task.named, speaks=task.answers)
    grow(made, rows_needed(peft.stored_adapter(folder) for folder in named.folders.values()))
    bank = Bank(made)
    for name, folder in named.folders.items():
        try:
            bank[name] = read_for(bank.model, folder)
        except NotImplementedError:
            continue  # an update relative to a part of W, which torch cannot give without numbers (PEFT's PiSSA)
        except ValueError as error:
            first, *others = (line.strip() for line in str(error).splitlines())
            more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
            raise LoraError(
                f"{name} ({folder}) is not for {named.base}: {' '.join([first, *others[:1]])}{more}"
            ) from None


def _quantised_as(folders: Mapping[str, str]) -> Quantize:
    found = {name: trained_on(folder) for name, folder in folders.items()}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}: {own}" for name, own in found.items())
        raise LoraError(
            f"the adapters were trained on a base that was quantised differently ({listed}): say --quantize."
        )
    return next(iter(found.values()), "none")


def _tokenizers(named: NamedAdapters) -> dict[str, PreTrainedTokenizerBase]:
    """The tokenizer of each folder: the chat template that training used travels with the adapter. Those that do the
    same are one object.
    """
    found: dict[str, PreTrainedTokenizerBase] = {}
    places = list(named.folders.values()) or [named.base]
    for folder in places:
        own = beside(folder, "tokenizer_config.json") if named.folders else None
        tokenizer = load_tokenizer(named.base if own is None else str(own.parent))
        for other, theirs in found.items():
            _refuse_other_ids(other, theirs, folder, tokenizer)
        found[folder] = next((other for other in found.values() if _do_the_same(other, tokenizer)), tokenizer)
    return found


def _refuse_other_ids(
    one: str, tokenizer: PreTrainedTokenizerBase, other: str, theirs: PreTrainedTokenizerBase
) -> None:
    ids, others = tokenizer.get_vocab(), theirs.get_vocab()
    token = next((token for token, index in ids.items() if others.get(token, index) != index), None)
    if token is not None:
        raise LoraError(
            f"{one} and {other} cannot share a base, because their tokenizers differ: {token!r} is token {ids[token]} "
            f"in one and {others[token]} in the other."
        )


def _do_the_same(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    return _described(one) == _described(other)


def _described(tokenizer: PreTrainedTokenizerBase) -> tuple[object, ...]:
    fast = getattr(tokenizer, "backend_tokenizer", None)
    how = tokenizer.get_vocab() if fast is None else fast.to_str()
    return how, tokenizer.chat_template, tokenizer.special_tokens_map
