"""Check the first step of training, to find an adapted layer that takes no part in it before hours pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..core.attach import adapted_layers
from ..core.unused import first_step_notes


class FirstStep(TrainerCallback):
    """Raises LoraError at the first optimizer step if an adapted layer was not used; prints what is idle."""

    def __init__(self) -> None:
        self._looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if self._looked:
            return
        self._looked = True
        for note in first_step_notes(model, adapted_layers(model)):
            if state.is_world_process_zero:
                print(note, flush=True)
