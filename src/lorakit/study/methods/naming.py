"""A method as a person writes it: its name, then the settings that differ from the default.

    lora                                    lora rank=8
    lora rank=4 targets=q_proj+v_proj       adapter-h bottleneck=64 norms=false

`method_of` reads it and `name_of` writes it; the size is always written, since tables are about sizes.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from ...core.errors import LoraError
from ...core.words import suggestion
from ...training.values import as_type, describe, outside
from .baselines import METHODS, Method


def method_of(text: str) -> Method:
    """The method that `text` names. Raises ValueError that says which word is wrong and what is expected."""
    name, *words = text.split() or [""]
    if name not in METHODS:
        raise LoraError(f"unknown method {name!r}.{suggestion(name, METHODS)} Methods: {', '.join(METHODS)}.")
    usual = METHODS[name]()
    types = typing.get_type_hints(type(usual))
    fields = {own.name: own for own in dataclasses.fields(usual)}
    known = list(fields)
    settings: dict[str, Any] = {}
    for word in words:
        setting, equals, value = word.partition("=")
        if not equals or setting not in known:
            takes = f"{name} takes {', '.join(f'{own}=…' for own in known) or 'no settings'}"
            raise LoraError(f"{text!r}: {word!r} is no setting;{suggestion(setting, known)} {takes}.")
        if setting in settings:
            raise LoraError(f"{text!r}: {setting} stands in it twice.")
        try:
            settings[setting] = _read(value, types[setting])
        except ValueError:
            raise LoraError(f"{text!r}: {setting}: expected {describe(types[setting])}, found {value!r}.") from None
        problem = outside(settings[setting], fields[setting].metadata.get("limits", {}))
        if problem:
            raise LoraError(f"{text!r}: {setting}: expected {problem}, found {value!r}.")
    return dataclasses.replace(usual, **settings)


def name_of(method: Method) -> str:
    """The shortest text that `method_of` reads as this method."""
    found: list[list[str]] = []
    for name, usual in ((name, make()) for name, make in METHODS.items()):
        if type(usual) is type(method):
            words = [
                f"{own.name}={_write(getattr(method, own.name))}"
                for index, own in enumerate(dataclasses.fields(method))
                if index == 0 or getattr(method, own.name) != getattr(usual, own.name)
            ]
            found.append([name, *words])
    return min((" ".join(words) for words in found), key=len)


def _read(value: str, wanted: Any) -> Any:
    if wanted == str | tuple[str, ...]:
        return tuple(part for part in value.split("+") if part) if "+" in value else value
    if wanted is bool:
        return as_type({"true": True, "false": False}.get(value.lower(), value), wanted)
    return as_type(value, wanted)


def _write(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(value) if len(value) > 1 else f"{value[0]}+"  # the + says that it is a tuple
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
