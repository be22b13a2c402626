"""`import loralib` served by lorakit: a program written for microsoft/LoRA's package runs unchanged."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from . import layers, trainable
from .adapted import LoRALayer

_LAYERS = ("LoRALayer", "Embedding", "Linear", "MergedLinear", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d")
_UTILS = ("mark_only_lora_as_trainable", "lora_state_dict")


def install_as_loralib() -> None:
    """Make `import loralib`, `loralib.layers` and `loralib.utils` give lorakit's layers and helpers.

    For this process only; nothing on disk changes. Called again it changes nothing. Raises RuntimeError where the
    real loralib is imported already: its classes would live on beside lorakit's.
    """
    present = sys.modules.get("loralib")
    if present is not None:
        if getattr(present, "LoRALayer", None) is LoRALayer:
            return
        raise RuntimeError(
            "install_as_loralib(): loralib is imported already. Call it before the first `import loralib`."
        )
    package = _module("loralib", layers, _LAYERS)
    package.layers = _module("loralib.layers", layers, _LAYERS)
    package.utils = _module("loralib.utils", trainable, _UTILS)
    package.utils.LoRALayer = LoRALayer
    for name in _UTILS:
        setattr(package, name, getattr(trainable, name))
    package.name = "lora"
    package.__path__ = []  # what makes it a package, whose submodules can be imported
    for module in (package, package.layers, package.utils):
        sys.modules[module.__name__] = module


def _module(name: str, source: ModuleType, names: tuple[str, ...]) -> Any:
    module = ModuleType(name, f"lorakit's, under loralib's name: {', '.join(names)}.")
    for public in names:
        setattr(module, public, getattr(source, public))
    return module
