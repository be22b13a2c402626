"""Whether a model is running. If it is, whoever reads a weight computes with it.

Some modules do not call a layer of theirs but multiply by its weight: Mamba's mixer, DeBERTa's relative positions, the
queries of SAM and DETR, a fused loss. For them `layer.weight` has to be W + ΔW. For everybody else it is the stored
parameter: for a person who looks at it, an optimizer, a state dict, code that ties or resizes weights.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch

_CALL = torch.nn.Module._call_impl.__code__
_CHECKPOINT = "torch.utils.checkpoint"  # it computes parts of a forward pass again inside the backward pass


def model_is_running() -> bool:
    """Whether a forward pass is on the call stack. Always true inside torch.compile, which compiles a forward pass."""
    if torch.compiler.is_compiling():
        return True
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code is _CALL or code.co_name == "forward" or frame.f_globals.get("__name__") == _CHECKPOINT:
            return True
        frame = frame.f_back
    return False
