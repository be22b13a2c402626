"""Which settings `lorakit train --sweep "learning_rate=1e-4,3e-4 rank=4,16"` asks for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from ..core.words import suggestion
from .config import TrainConfig
from .settings import UsageError

SWEPT = ("learning_rate", "weight_decay", "rank", "alpha", "dropout", "rslora", "init")


_FLAGS = {"true": True, "false": False}


def swept(config: TrainConfig) -> dict[str, TrainConfig]:
    """The settings of each adapter of a sweep, by name: "learning_rate=0.0001 rank=4". Empty without a sweep.

    Raises UsageError for what cannot be swept.
    """
    if config.sweep is None:
        return {}
    values: dict[str, list[Any]] = {}
    for part in config.sweep.split():
        name, equals, listed = part.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        name = {"lr": "learning_rate"}.get(name, name)
        if not equals or not all(listed.split(",")):
            raise UsageError(f"--sweep {part!r}: expected NAME=VALUE,VALUE, such as learning_rate=1e-4,3e-4.")
        if name not in SWEPT:
            raise UsageError(f"--sweep cannot vary {name!r}, only {', '.join(SWEPT)}.{suggestion(name, SWEPT)}")
        values[name] = [_FLAGS.get(value, value) for value in listed.split(",")]
    refuse_chosen(config, "--sweep")
    if config.resume is not None:
        raise UsageError("--sweep has no checkpoints, so there is nothing to --resume.")
    found = {}
    for combination in itertools.product(*values.values()):
        given = dict(zip(values, combination, strict=True))
        own = dataclasses.replace(config, sweep=None, **given)
        found[setting_name({name: getattr(own, name) for name in values})] = own
    if len(found) < 2:
        raise UsageError(f"--sweep {config.sweep!r} is one setting: give at least two values.")
    return found


def refuse_chosen(config: TrainConfig, what: str) -> None:
    """Raise UsageError for settings that choose among the states of one run. what: asks for several runs."""
    if config.metric != "loss" or config.patience is not None or config.keep != "last":
        raise UsageError(f"{what} keeps the adapter with the lowest last loss: leave --metric, --patience, --keep out.")
    if config.from_adapter is not None:
        raise UsageError(f"{what} begins with new adapters: leave --from out.")


def unshared(config: TrainConfig) -> str:
    """The flags of settings with which several adapters cannot be trained in one batch; empty if there is none."""
    found = {
        "--dora": config.dora,
        "--bias": config.bias != "none",
        "--also-train": config.also_train,
        "--new-tokens": config.new_tokens,
        "--packing": config.packing,
    }
    return ", ".join(flag for flag, given in found.items() if given)


def setting_name(values: Mapping[str, Any]) -> str:
    """Settings as the name of what they give: "learning_rate=0.0001 rank=4"."""
    return " ".join(f"{name}={f'{value:g}' if isinstance(value, float) else value}" for name, value in values.items())
