"""Weights in parts, one on each process: torch's DTensor, as FSDP2 (`fully_shard`) and tensor parallelism make them.

An adapted model can be sharded: its factors are then sharded too, and gathered when they are extracted. A sharded model
cannot be adapted: new factors would be outside of what the processes exchange, and each would train its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor. A method tells, because importing the class takes as long as importing lorakit."""
    return hasattr(tensor, "full_tensor")


def sharded_refusal(module: nn.Module) -> str | None:
    """Why a module cannot be adapted because of its own sharded parameters, or None."""
    if not any(is_sharded(parameter) for parameter in module._parameters.values()):
        return None
    return "its weight is sharded (FSDP2 or tensor parallelism). Call attach or load first, and shard the model after"


def writes(model: nn.Module) -> bool:
    """Whether this process is the one that writes a file: of a sharded model the first one, which all have helped."""
    return not any(map(is_sharded, model.parameters())) or torch.distributed.get_rank() == 0


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor. If it is sharded, every process has to ask for it at the same time."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole
