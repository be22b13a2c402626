"""`peft_view` and `get_peft_model`: a program that asks for PEFT's model runs on lorakit's.

    view = lorakit.peft_view(model)                     # of a model that is adapted, or of a Bank
    view = lorakit.get_peft_model(model, LoraConfig())  # instead of peft.get_peft_model
    DPOTrainer(view, …)                                 # isinstance(view, peft.PeftModel)

PEFT is needed for its classes alone, and imported only here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..bank.bank import Bank
from ..core.errors import LoraError
from ..core.names import VIEWED

if TYPE_CHECKING:
    from peft import LoraConfig

    from .model import PeftView


def peft_view(model: nn.Module | Bank) -> PeftView:
    """A `peft.PeftModel` over `model`, adapted in place, or over a bank of adapters. It holds no tensor of its own.

    An adapter that the model has is called "default". Adapters that are not in use are frozen, as in PEFT; choose with
    `set_adapter` from now on. Raises LoraError where there is no adapter, and where PEFT is not installed.
    """
    if VIEWED in model.__dict__:
        raise LoraError(f"{type(model).__name__} is a view already: use it as it is.")
    bank = model if isinstance(model, Bank) else Bank(model)
    if not bank:
        raise LoraError(
            f"{type(bank.model).__name__} has no adapter to view: call lorakit.attach first, or "
            "lorakit.get_peft_model(model, LoraConfig(…))."
        )
    if bank.room is not None:
        raise LoraError(
            "a bank with rank and room keeps its adapters beside the layers, where they cannot be merged or switched "
            "off. Make the view of lorakit.Bank(model)."
        )
    return _view_class()(bank)


def get_peft_model(
    model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default", **settings: Any
) -> PeftView:
    """Adapt `model` in place by PEFT's configuration, and give a `peft.PeftModel` over it: `peft.get_peft_model`.

    settings: autocast_adapter_dtype=False keeps the factors in the weights' dtype; others of PEFT's have no effect.
    Raises LoraError for a configuration of something that lorakit does not compute, naming the field.
    """
    view_class = _view_class()
    if settings.pop("mixed", False):
        raise LoraError("mixed=True: lorakit has LoRA adapters alone, which need no mixed model. Leave it out.")
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or peft_config.base_model_name_or_path
    if revision := settings.pop("revision", None):
        peft_config.revision = revision
    return view_class(model, peft_config, adapter_name, **settings)


def _view_class() -> type[PeftView]:
    try:
        from .model import PeftView
    except ImportError as error:
        raise LoraError(f"a view as a PeftModel needs PEFT: pip install peft ({error}).") from None
    return PeftView
