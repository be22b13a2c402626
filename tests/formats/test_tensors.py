"""Tensors written without NumPy are those that safetensors itself writes, byte for byte."""

import ctypes
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lorakit.formats.tensors import _spec, write_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_the_bytes_are_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "b": torch.arange(12).reshape(3, 4).to(dtype),
        "a": torch.tensor(2).to(dtype),
        "c.d": torch.ones(1, 2, 3),
    }
    write_tensors(tensors, tmp_path / "ours")
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_what_older_versions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(safetensors, "TensorSpec")
    tensor = torch.tensor([[1.0, 2.0]])
    expected = (ctypes.c_float * 2)(1.0, 2.0)
    assert _spec(tensor) == {"dtype": "float32", "shape": [1, 2], "data": bytes(expected)}
