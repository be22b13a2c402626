"""An adapter's folder: its base model, the files beside it, and advice for a run's folder that has no adapter yet.

`locating.py` finds where a model is. No weight is read here.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..core.errors import LoraError
from ..core.paths import expanded
from ..core.reading import json_of, missing
from ..formats import peft
from .locating import locate

ADAPTERS = "adapters"  # in a run's folder: a folder for each adapter, if its rows named them


def adapters_in(folder: str | Path) -> dict[str, str]:
    """The adapters of a run whose rows named them, by name: their folders. Empty for another folder."""
    path = Path(expanded(folder))
    if is_adapter(path) or not (path / ADAPTERS).is_dir():
        return {}
    return {own.name: str(own) for own in sorted((path / ADAPTERS).iterdir()) if is_adapter(own)}


def is_adapter(path: str | Path) -> bool:
    """Whether `path` is an adapter's folder rather than a model's."""
    return (Path(path) / peft.CONFIG).is_file()


def base_and_adapter(name: str, adapter: str | None) -> tuple[str, str | None]:
    """The base model and the adapter's folder that "--model NAME --adapter ADAPTER" means.

    Raises FileNotFoundError if one of them is not found, ValueError if the two do not go together.
    """
    if adapter is not None:
        check_adapter(adapter)
        if is_adapter(name):
            raise LoraError(
                f"{name} is an adapter's folder itself. Give one adapter and its base: --model BASE --adapter {adapter}"
            )
        _refuse_no_model(name)
        return name, adapter
    if is_adapter(name):
        return base_named_by(name), name
    _refuse_no_model(name)
    return name, None


def base_named_by(adapter: str) -> str:
    """The base model that an adapter's folder names. Raises ValueError if it names none, or one that is not found."""
    base = adapter_config(adapter).get("base_model_name_or_path")
    give = f"give it: --model BASE --adapter {shlex.quote(adapter)}"
    if not base:
        raise LoraError(f"{adapter}/{peft.CONFIG} names no base model; {give}")
    try:
        _refuse_no_model(str(base))
    except FileNotFoundError as error:
        raise LoraError(f"{adapter}/{peft.CONFIG} names the base model {base}: {error} Or {give}") from None
    return str(base)


def adapter_config(adapter: str) -> dict[str, Any]:
    """PEFT's configuration of an adapter's folder."""
    check_adapter(adapter)
    return json_of(Path(adapter) / peft.CONFIG, dict)


def check_adapter(folder: str) -> None:
    """Raise FileNotFoundError if `folder` is not an adapter's folder; the message says what it is instead."""
    path = Path(expanded(folder))
    if is_adapter(path):
        return
    if not path.is_dir():
        raise FileNotFoundError(f"no adapter at {missing(path)}")
    model = " It holds a whole model." if (path / "config.json").is_file() else ""
    reason = f"{folder} is no adapter folder: it has no {peft.CONFIG}.{model}"
    raise FileNotFoundError(_unfinished(path) or reason)


def beside(adapter: str | Path | None, name: str) -> Path | None:
    """The file of this name that belongs to an adapter: in its folder or, for a checkpoint, in its run's folder."""
    if adapter is None:
        return None
    folder = Path(expanded(adapter))
    parents = [folder.resolve().parent] if folder.resolve().name.startswith("checkpoint-") else []
    return next((path for own in (folder, *parents) if (path := own / name).is_file()), None)


def _refuse_no_model(name: str) -> None:
    """Raise FileNotFoundError if `name` is not a model. For an interrupted run's folder the message says what to do."""
    path = Path(expanded(name))
    if path.is_dir() and not (path / "config.json").is_file() and not any(path.glob("*.gguf")):
        reason = f"{name} is no model folder: it has no config.json and no .gguf file."
        if (path / "tokenizer_config.json").is_file():  # otherwise the message of `locate` says more
            raise FileNotFoundError(_unfinished(path) or reason)
        if unfinished := _unfinished(path):
            raise FileNotFoundError(unfinished)
    locate(name)


def _unfinished(folder: Path) -> str | None:
    """What to do with the folder of a training run that has not written its adapter, or that wrote several; None for
    other folders.
    """
    if several := adapters_in(folder):
        first = next(iter(several.values()))
        return f"{folder} holds several adapters: {', '.join(several)}. Name the folder of one, such as {first}"
    settings = folder / "config.yaml"
    whole = [path for path in folder.glob("checkpoint-*") if is_adapter(path) and (path / peft.TENSORS).is_file()]
    newest = max(whole, key=lambda path: (len(path.name), path.name), default=None)
    if newest is None and not settings.is_file():
        return None
    go_on = f"lorakit train --config {shlex.quote(str(settings))}" if settings.is_file() else "lorakit train …"
    if newest is None:
        return (
            f"{folder} holds a training run that ended before its first checkpoint, and no adapter. "
            f"Run it again: {go_on} --overwrite"
        )
    return (
        f"{folder} holds a training run that was interrupted: there is no adapter yet. Go on with it: {go_on} "
        f"--resume auto. Or use its newest checkpoint: --model {shlex.quote(str(newest))}"
    )
