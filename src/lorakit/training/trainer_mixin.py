"""Checkpoints of the adapter alone, for transformers' Trainer and every class derived from it.

Trainer writes the whole model in `_save` and reads it in `_load_from_checkpoint` and `_load_best_model`. A callback
cannot change that: it is called after saving, and never gets to know the trainer. So this is a class to derive from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import LoraError
from ..core.state import refuse_unadapted
from .state_files import read_state, write_state

_ARGUMENTS = "training_args.bin"  # Trainer's own name


class TrainerMixin:
    """Put before a trainer of transformers, TRL or sentence-transformers, it makes checkpoints hold the adapter alone.

        class Trainer(lorakit.TrainerMixin, transformers.Trainer): ...

        lorakit.attach(model)
        trainer = Trainer(model, args, train_dataset=rows)
        trainer.train()                               # or resume_from_checkpoint=True
        trainer.save_model("adapter")                 # what lorakit.save writes, with the tokenizer

    A checkpoint and the folder of `save_model` have PEFT's two files, and `adapter_state.safetensors` with the exact
    tensors that were trained: a resumed run equals an uninterrupted one bit for bit, whatever the init. No frozen
    weight is written. `load_best_model_at_end` loads the best adapter. The first step fails if an adapted layer takes
    no part in it.

    Nothing is changed but the methods of the new class: `_save`, `_load_from_checkpoint` and `_load_best_model`.

    Raises LoraError for a model without an adapter, for FSDP and DeepSpeed, which write their own checkpoints of the
    whole model, and when the class is made, if the mixin does not come first.
    """

    args: Any
    data_collator: Any
    model: Any
    processing_class: Any
    state: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__mro__:
            if issubclass(base, TrainerMixin):
                continue
            if "_save" in base.__dict__ and base in cls.__mro__[: cls.__mro__.index(TrainerMixin)]:
                raise LoraError(
                    f"{base.__name__} comes before TrainerMixin in the bases of {cls.__name__} and would write the "
                    f"whole model. Name the mixin first: class {cls.__name__}(lorakit.TrainerMixin, {base.__name__})."
                )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        for name in ("FSDP", "DeepSpeed"):
            if getattr(trainer, f"is_{name.lower()}_enabled", False):
                raise LoraError(
                    f"under {name}, transformers' Trainer writes checkpoints of the whole model, which TrainerMixin "
                    "cannot change. Use the trainer without it, and lorakit.save at the end."
                )
        refuse_unadapted(self.model)
        from .watch import FirstStep  # the one part that imports transformers

        trainer.add_callback(FirstStep())

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        write_state(self.model, folder)
        beside = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        if beside is not None:
            beside.save_pretrained(folder)
        torch.save(self.args, folder / _ARGUMENTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        read_state(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)
