"""Gradient checkpointing by the names that the installed transformers has for it: it was renamed."""

from __future__ import annotations

import dataclasses
from typing import Any


def checkpointing(wanted: bool) -> dict[str, bool]:
    """The argument of `TrainingArguments`."""
    from transformers import TrainingArguments

    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": wanted}


def begin_checkpointing(model: Any) -> None:
    renamed = hasattr(model, "activation_checkpointing_enable")
    (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()


def end_checkpointing(model: Any) -> None:
    """Trainer begins it and leaves it: a model may serve several runs, and the next one has settings of its own."""
    renamed = hasattr(model, "activation_checkpointing_disable")
    (model.activation_checkpointing_disable if renamed else model.gradient_checkpointing_disable)()
    model.disable_input_require_grads()  # put in with it, and not taken out
