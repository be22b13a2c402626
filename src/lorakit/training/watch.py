"""A look at the first step of training: an adapted layer that takes no part in it is found before hours pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..core.attach import adapted_layers
from ..core.unused import refuse_silent


class FirstStep(TrainerCallback):
    """Raises ValueError at the first optimizer step where an adapted layer was passed over."""

    def __init__(self) -> None:
        self._looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if not self._looked:
            self._looked = True
            refuse_silent(model, adapted_layers(model), "Name other targets: nothing was trained yet.")
