"""`import loralib` served by lorakit: a program written for microsoft/LoRA's package runs unchanged."""

from __future__ import annotations

import math
import sys
import typing
from types import ModuleType
from typing import Any

import torch
from torch import nn

from . import layers, trainable
from .lora_layer import LoRALayer

_LAYERS = ("LoRALayer", "Embedding", "Linear", "MergedLinear", "ConvLoRA", "Conv1d", "Conv2d", "Conv3d")
_UTILS = ("mark_only_lora_as_trainable", "lora_state_dict")


def install_as_loralib() -> None:
    """Make `import loralib`, `loralib.layers` and `loralib.utils` give lorakit's layers and helpers.

    This affects this process only; nothing on disk changes. A second call changes nothing. Raises RuntimeError if the
    real loralib is already imported, because its classes would stay in use beside lorakit's.
    """
    present = sys.modules.get("loralib")
    if present is not None:
        if getattr(present, "LoRALayer", None) is LoRALayer:
            return
        raise RuntimeError(
            "install_as_loralib(): loralib is imported already. Call it before the first `import loralib`."
        )
    in_layers = {name: getattr(layers, name) for name in _LAYERS}
    in_utils = {name: getattr(trainable, name) for name in _UTILS}
    # `from loralib.layers import *` also gives what loralib's own modules import.
    in_layers |= dict(torch=torch, nn=nn, F=nn.functional, math=math, Optional=typing.Optional, List=list)
    in_utils |= dict(torch=torch, nn=nn, Dict=dict, LoRALayer=LoRALayer)
    package = _module("loralib", in_layers | in_utils | {"name": "lora"})
    package.layers = _module("loralib.layers", in_layers)
    package.utils = _module("loralib.utils", in_utils)
    package.__path__ = []  # this makes it a package, so its submodules can be imported
    for module in (package, package.layers, package.utils):
        sys.modules[module.__name__] = module


def _module(name: str, contents: dict[str, Any]) -> Any:
    module = ModuleType(name, "lorakit's, under loralib's name.")
    vars(module).update(contents)
    return module
