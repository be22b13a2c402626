"""Check the first step of training, to find an adapted layer that takes no part in it before hours pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..core.attach import adapted_layers
from ..core.unused import idle_note, listed, refuse_silent, without_dropout


class FirstStep(TrainerCallback):
    """Raises ValueError at the first optimizer step if an adapted layer was not used; prints what is idle."""

    def __init__(self) -> None:
        self._looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if self._looked:
            return
        self._looked = True
        layers = adapted_layers(model)
        refuse_silent(model, layers, "Name other targets: nothing was trained yet.")
        if state.is_world_process_zero and (note := idle_note(model, layers)):
            print(f"note: in the first step {note}", flush=True)
        if state.is_world_process_zero and (names := without_dropout(layers)):
            print(
                "\n".join(("note: the model reads these weights, so dropout never acts there:", *listed(names))),
                flush=True,
            )
