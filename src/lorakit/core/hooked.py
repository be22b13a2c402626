"""Modules whose forward pass accelerate replaced on the instance, as it does for a device_map over several devices.

Its `forward` moves the input to the module's device, and calls what it keeps as `_old_forward`: the forward pass of the
class that the module had, bound to the module. When the module changes its class, this follows (`follow_class`).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn


def forward_refusal(module: nn.Module) -> str | None:
    """Why the forward pass of another class would not be called, or None."""
    attributes = vars(module)
    if "forward" not in attributes:
        return None
    kept = getattr(attributes.get("_old_forward"), "__func__", None)
    if "_hf_hook" not in attributes or kept is not type(module).forward:
        return "its forward is replaced on the instance, so changing its class would do nothing"
    hook: Any = attributes["_hf_hook"]
    if any(getattr(own, "offload", False) for own in (hook, *getattr(hook, "hooks", ()))):
        return (
            "the device_map offloads its weight, which is on its device only in its forward pass. Load the model with "
            "a device_map that gives this layer a device, or quantised, so that it needs no offloading"
        )
    return None


def follow_class(module: nn.Module) -> None:
    """Let accelerate's `forward` call the forward pass of the class that the module has now."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = MethodType(type(module).forward, module)
