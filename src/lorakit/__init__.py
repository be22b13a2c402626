"""LoRA for PyTorch: adapt any model in place, train, merge exactly, and save what every other program reads.

    import lorakit

    print(lorakit.attach(model, "all-linear", rank=16))
    ...                                   # train as before: only the adapter has gradients
    lorakit.save(model, "my-adapter")     # PEFT's folder

The names below are the whole public API. Each is imported when it is first used, so that the command line can print its
help without waiting for torch.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

if _TYPE_CHECKING:
    from .bank.bank import Bank as Bank
    from .core.adapted import AdaptedLayer as AdaptedLayer
    from .core.adapter import TokenRows as TokenRows
    from .core.adapter import Update as Update
    from .core.attach import adapted_layers as adapted_layers
    from .core.attach import attach as attach
    from .core.attach import detach as detach
    from .core.beside import Beside as Beside
    from .core.combine import combine as combine
    from .core.dequantize import dequantize as dequantize
    from .core.diagnose import diagnose as diagnose
    from .core.errors import LoraError as LoraError
    from .core.exchange import extract as extract
    from .core.exchange import insert as insert
    from .core.format import Format as Format
    from .core.format import add_format as add_format
    from .core.init import add_init as add_init
    from .core.kinds import adapts as adapts
    from .core.layers import Conv1d as Conv1d
    from .core.layers import Conv2d as Conv2d
    from .core.layers import Conv3d as Conv3d
    from .core.layers import ConvLoRA as ConvLoRA
    from .core.layers import Embedding as Embedding
    from .core.layers import Linear as Linear
    from .core.layers import MergedLinear as MergedLinear
    from .core.lora_layer import LoRALayer as LoRALayer
    from .core.loralib import install_as_loralib as install_as_loralib
    from .core.optimizing import parameter_groups as parameter_groups
    from .core.optimizing import parameters as parameters
    from .core.report import Report as Report
    from .core.settings import LoRASettings as LoRASettings
    from .core.switching import bake as bake
    from .core.switching import disabled as disabled
    from .core.switching import merge as merge
    from .core.switching import unmerge as unmerge
    from .core.trainable import lora_state_dict as lora_state_dict
    from .core.trainable import mark_only_lora_as_trainable as mark_only_lora_as_trainable
    from .formats import Adapter as Adapter
    from .formats import load as load
    from .formats import save as save
    from .training.accelerator import hook_accelerator as hook_accelerator
    from .training.lightning_callback import LightningCallback as LightningCallback
    from .training.merging_files import merge_files as merge_files
    from .training.trainer_mixin import TrainerMixin as TrainerMixin
    from .view.peft_view import get_peft_model as get_peft_model
    from .view.peft_view import peft_view as peft_view

_HOME = {
    "bank.bank": ("Bank",),
    "core.adapted": ("AdaptedLayer",),
    "core.lora_layer": ("LoRALayer",),
    "core.adapter": ("TokenRows", "Update"),
    "core.attach": ("adapted_layers", "attach", "detach"),
    "core.beside": ("Beside",),
    "core.combine": ("combine",),
    "core.diagnose": ("diagnose",),
    "core.errors": ("LoraError",),
    "core.exchange": ("extract", "insert"),
    "core.format": ("Format", "add_format"),
    "core.init": ("add_init",),
    "core.kinds": ("adapts",),
    "core.layers": ("Conv1d", "Conv2d", "Conv3d", "ConvLoRA", "Embedding", "Linear", "MergedLinear"),
    "core.loralib": ("install_as_loralib",),
    "core.optimizing": ("parameter_groups", "parameters"),
    "core.report": ("Report",),
    "core.settings": ("LoRASettings",),
    "core.dequantize": ("dequantize",),
    "core.switching": ("bake", "disabled", "merge", "unmerge"),
    "core.trainable": ("lora_state_dict", "mark_only_lora_as_trainable"),
    "formats": ("Adapter", "load", "save"),
    "training.accelerator": ("hook_accelerator",),
    "training.lightning_callback": ("LightningCallback",),
    "training.merging_files": ("merge_files",),
    "training.trainer_mixin": ("TrainerMixin",),
    "view.peft_view": ("get_peft_model", "peft_view"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__version__ = _version("lorakit")
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> _Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    value = getattr(_import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
