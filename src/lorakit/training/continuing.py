"""Training that goes on with an adapter: its factors, rank, scale and targets are where the run begins.

The adapter decides what it is. A setting that says something else would be passed over, so it is refused, with both
values. Only the dropout may differ, because it changes nothing of what the adapter computes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.attach import attach
from ..core.errors import LoraError
from ..core.exchange import insert
from ..core.host import Host
from ..core.names import named_modules
from ..core.report import Report
from ..core.settings import LoRASettings
from ..core.targets import matching, select
from ..formats import peft, read_for
from ..formats.renamed import translated
from .adapter_folder import beside, check_adapter
from .config import TrainConfig, is_given
from .models import load_tokenizer
from .vocabulary import trained_tokens

_NAMED = 3  # modules in a message


def taken_over(config: TrainConfig) -> tuple[TrainConfig, Adapter | None]:
    """The settings with those of the adapter that the run goes on with, as far as its files tell; and that adapter.

    Raises LoraError listing the settings that contradict it, FileNotFoundError if there is no adapter.
    """
    if config.from_adapter is None:
        return config, None
    check_adapter(config.from_adapter)
    adapter = peft.stored_adapter(config.from_adapter)
    found = _settings_of(adapter)
    lines = []
    for name, value in found.items():
        wanted = getattr(config, name)
        if name != "also_train" and is_given(config, name) and wanted != value:
            lines.append(f"  --{name.replace('_', '-')} {_shown(wanted)}: the adapter has {_shown(value)}")
    if config.init != "kaiming":
        lines.append(f"  --init {config.init}: the factors begin as those of the adapter")
    _refuse(config, lines)
    kept = {name: value for name, value in found.items() if name != "also_train"}
    kept["new_tokens"] = _tokens_of(adapter, config.from_adapter)
    if is_given(config, "new_tokens") and set(config.new_tokens) != set(kept["new_tokens"]):
        given, own = (", ".join(tokens) or "none" for tokens in (config.new_tokens, kept["new_tokens"]))
        _refuse(config, [f"  --new-tokens {given}: the adapter has {own}"])
    if not is_given(config, "dropout"):
        kept["dropout"] = adapter.dropout
    # The head of a classifier is trained whole in any case, and named by no setting.
    if not is_given(config, "also_train"):
        kept["also_train"] = found["also_train"]
    return dataclasses.replace(config, **kept), adapter


def in_names_of(model: nn.Module, adapter: Adapter) -> Adapter:
    """The adapter with the names that its modules have in `model`, which needs no weights."""
    return translated(adapter, Host(model))


def planned(config: TrainConfig, model: nn.Module, adapter: Adapter, given: TrainConfig) -> tuple[TrainConfig, Report]:
    """`attach` with the shapes of the adapter, on a model without weights; the settings with the adapter's targets.

    given: the settings before `taken_over`. Raises LoraError if they choose other modules than the adapter has.
    """
    names = list(adapter.updates)
    lines = []
    if any(is_given(given, name) for name in ("targets", "exclude")):
        chosen = set(select(model, given.targets, given.exclude).targets)
        lines += _differing("--targets", chosen, set(names))
    if is_given(given, "also_train"):
        modules = [name for name, _ in named_modules(model) if name]
        chosen = {hit for pattern in given.also_train for hit in matching(pattern, modules)}
        lines += _differing("--also-train", chosen, set(adapter.also_train))
    _refuse(config, lines)
    settings = LoRASettings(
        targets=names,
        rank=config.rank,
        rank_pattern={name: own.rank for name, own in adapter.updates.items() if own.rank != config.rank},
        dropout=config.dropout,
        dora=config.dora,
        bias=config.bias,
        also_train=adapter.also_train,
        trainable_tokens={name: rows.tokens for name, rows in adapter.token_rows.items()},
    )
    targets = adapter.targets if set(_selected(model, adapter.targets)) == set(names) else tuple(names)
    return dataclasses.replace(config, targets=targets, exclude=()), attach(model, settings)


def begin_with(config: TrainConfig, model: nn.Module) -> None:
    """Put the adapter into the model, ready to be trained."""
    assert config.from_adapter is not None
    adapter = dataclasses.replace(read_for(model, config.from_adapter), dropout=config.dropout)
    try:
        insert(model, adapter)
    except ValueError as error:
        raise LoraError(f"--from-adapter {config.from_adapter}: {error}") from None


def _settings_of(adapter: Adapter) -> dict[str, Any]:
    """What an adapter says of the settings. Where its modules differ, what most of them have."""

    def most(values: list[Any]) -> Any:
        return Counter(values).most_common(1)[0][0]

    updates = list(adapter.updates.values())
    if not updates:
        raise LoraError("--from-adapter: the adapter has no factors, so there is nothing to go on with.")
    return {
        "rank": most([own.rank for own in updates]),
        "alpha": float(most([own.alpha for own in updates])),
        "rslora": most([own.rslora for own in updates]),
        "dora": any(own.magnitude is not None for own in updates),
        "bias": adapter.bias,
        "also_train": adapter.also_train,
    }


def _tokens_of(adapter: Adapter, folder: str) -> tuple[str, ...]:
    """The tokens whose rows an adapter has, by the tokenizer in its folder."""
    numbers = trained_tokens(adapter)
    if not numbers:
        return ()
    own = beside(folder, "tokenizer_config.json")
    if own is None:
        raise LoraError(
            f"--from-adapter {folder} has trained rows of tokens, and no tokenizer that says which they are: put the "
            "files of its tokenizer into the folder."
        )
    return tuple(load_tokenizer(str(own.parent)).convert_ids_to_tokens(numbers))


def _selected(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    try:
        return list(select(model, targets).targets)
    except LoraError:  # PEFT's regular expressions are no targets here
        return []


def _differing(flag: str, chosen: set[str], there: set[str]) -> list[str]:
    lines = []
    for names, said in ((chosen - there, "not in the adapter"), (there - chosen, "left out, and in the adapter")):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            lines.append(f"  {flag}: {said}: {', '.join(sorted(names)[:_NAMED])}{more}")
    return lines


def _refuse(config: TrainConfig, lines: list[str]) -> None:
    if lines:
        raise LoraError(
            f"--from-adapter {config.from_adapter} goes on with an adapter of other settings:\n"
            + "\n".join(lines)
            + "\nLeave these settings out, or train a new adapter without --from-adapter."
        )


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
