"""Writing a .safetensors file without NumPy, which `safetensors.torch.save_file` needs and torch does not."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write contiguous tensors that are not empty, with the metadata that readers expect of PyTorch's files."""
    held = {name: tensor.detach().cpu() for name, tensor in tensors.items()}  # while their addresses are in use
    safetensors.serialize_file({name: _spec(tensor) for name, tensor in held.items()}, path, {"format": "pt"})


def _spec(tensor: Tensor) -> Any:
    dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
    if hasattr(safetensors, "TensorSpec"):
        return safetensors.TensorSpec(dtype=dtype, shape=shape, data_ptr=tensor.data_ptr(), data_len=tensor.nbytes)
    return {"dtype": dtype, "shape": shape, "data": ctypes.string_at(tensor.data_ptr(), tensor.nbytes)}  # before 0.8
