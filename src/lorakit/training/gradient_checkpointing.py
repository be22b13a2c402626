"""Gradient checkpointing under the name that the installed version of transformers has for it."""

from __future__ import annotations

import dataclasses
from typing import Any


def checkpointing(wanted: bool) -> dict[str, bool]:
    """The argument of `TrainingArguments` that turns it on or off."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": wanted}


def begin_checkpointing(model: Any) -> None:
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()


def end_checkpointing(model: Any) -> None:
    """Turn it off. Trainer only turns it on, but the next run on the same model may have other settings."""
    renamed = hasattr(model, "activation_checkpointing_disable")
    (model.activation_checkpointing_disable if renamed else model.gradient_checkpointing_disable)()
    model.disable_input_require_grads()  # turned on with checkpointing, but not turned off with it
