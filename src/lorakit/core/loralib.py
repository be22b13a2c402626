"""`import loralib` served by lorakit: a program written for microsoft/LoRA's package runs unchanged."""

from __future__ import annotations

import sys
from types import ModuleType

from . import layers, trainable

_LAYERS = ("LoRALayer", "Embedding", "Linear", "MergedLinear", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d")
_UTILS = ("mark_only_lora_as_trainable", "lora_state_dict")


def install_as_loralib() -> None:
    """Make `import loralib`, `loralib.layers` and `loralib.utils` give lorakit's layers and helpers.

    For this process only; nothing on disk changes. Called again it changes nothing. Raises RuntimeError where the
    real loralib is imported already: its classes would live on beside lorakit's.
    """
    present = sys.modules.get("loralib")
    if present is not None:
        if getattr(present, "LoRALayer", None) is layers.LoRALayer:
            return
        raise RuntimeError(
            "install_as_loralib(): loralib is imported already. Call it before the first `import loralib`."
        )
    package = _module("loralib", layers, _LAYERS)
    package.__path__ = []  # what makes it a package, whose submodules can be imported
    package.__dict__.update({name: getattr(trainable, name) for name in _UTILS}, name="lora")
    package.__dict__["layers"] = _module("loralib.layers", layers, _LAYERS)
    package.__dict__["utils"] = _module("loralib.utils", trainable, _UTILS)
    package.__dict__["utils"].LoRALayer = layers.LoRALayer
    for module in (package, package.__dict__["layers"], package.__dict__["utils"]):
        sys.modules[module.__name__] = module


def _module(name: str, source: ModuleType, names: tuple[str, ...]) -> ModuleType:
    module = ModuleType(name, f"lorakit's, under loralib's name: {', '.join(names)}.")
    module.__dict__.update({public: getattr(source, public) for public in names})
    return module
