"""Lightning's checkpoints without the frozen base.

A `Callback.on_save_checkpoint` is not called for checkpoints of weights alone, and loading has no such hook before it.
So the callback changes the trainer's strategy, through which all state dicts of the module go, in both directions.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from ..core.attach import adapted_layers
from ..core.errors import LoraError
from ..core.state import refuse_unadapted, without_base
from ..core.unused import first_step_notes

_Callback: Any = object
for _name in ("lightning.pytorch", "pytorch_lightning"):  # the same classes twice; a trainer of one takes the other's
    with contextlib.suppress(ImportError):
        _Callback = importlib.import_module(_name).Callback
        break


class LightningCallback(_Callback):
    """Lightning's checkpoints hold the adapter, and whatever else is trained, without the frozen base.

        trainer = lightning.Trainer(callbacks=[lorakit.LightningCallback()])
        trainer.fit(module)                                   # or ckpt_path="last"
        trainer.validate(module, ckpt_path="best")
        lorakit.save(module.model, "adapter")                 # PEFT's folder

    The module, or a part of it, was given to `attach`. Optimizers, loops and callbacks are in the file as before. On
    loading, the base's tensors are those of the module; all others have to be in the file (`strict_loading`). The first
    step fails if an adapted layer takes no part in it.

    `MyModule.load_from_checkpoint(path)` makes a new module without a trainer: it needs `strict=False`, and attach in
    the module's `__init__`.

    Changes two methods of this trainer's strategy, `lightning_module_state_dict` and `load_model_state_dict`, and not
    the module. Raises LoraError for a module without an adapter, and for FSDP, DeepSpeed and ModelParallelStrategy,
    which write their own checkpoints of the whole model.
    """

    def __init__(self) -> None:
        if _Callback is object:
            raise LoraError('LightningCallback needs Lightning, which is not installed: pip install "lightning>=2.6.4"')
        self._looked = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        strategy = trainer.strategy
        if strategy.restore_checkpoint_after_setup:
            raise LoraError(
                f"{type(strategy).__name__} writes checkpoints of the whole model, which LightningCallback cannot "
                "change. Leave the callback out, and call lorakit.save at the end."
            )
        # A second setup (fit, then validate) sets them to the same again: both begin from the class's own methods.
        strategy.lightning_module_state_dict = partial(_state_dict, strategy)
        strategy.load_model_state_dict = partial(_load_state_dict, strategy)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        refuse_unadapted(pl_module)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self._looked:
            return
        self._looked = True
        for note in first_step_notes(pl_module, adapted_layers(pl_module)):
            if trainer.is_global_zero:
                print(note, flush=True)


def _state_dict(strategy: Any) -> dict[str, Any]:
    return without_base(strategy.lightning_module, type(strategy).lightning_module_state_dict(strategy))


def _load_state_dict(strategy: Any, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
    module: nn.Module = strategy.lightning_module
    whole = module.state_dict()
    kept = without_base(module, whole)
    base = {name: value for name, value in whole.items() if name not in kept}
    type(strategy).load_model_state_dict(
        strategy, {**checkpoint, "state_dict": base | checkpoint["state_dict"]}, strict=strict
    )
