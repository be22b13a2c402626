"""Adapter folders made by hand, and compared in PEFT."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import nn

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


def small() -> nn.Sequential:
    """Two linear layers, the same on every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()


def factors(name: str = "0", inputs: int = 8, outputs: int = 8, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        f"{PREFIX}{name}.lora_A.weight": torch.randn(rank, inputs, generator=generator),
        f"{PREFIX}{name}.lora_B.weight": torch.randn(outputs, rank, generator=generator),
    }


def folder(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    """A PEFT folder of these tensors; the fields of `config` replace those of an adapter of rank 4."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = factors() if tensors is None else tensors
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / TENSORS)
    base = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "bias": "none", "target_modules": ["0"]}
    (path / CONFIG).write_text(json.dumps({**base, **config}), encoding="utf-8")
    return path


def made_in_peft(model: nn.Module, path: Path, scale: float = 0.1, **settings: object) -> nn.Module:
    """An adapter made by PEFT with every trainable parameter moved, saved at `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        live = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in live.parameters():
                if parameter.requires_grad:
                    parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        live.save_pretrained(str(path))
    return live


def read_in_peft(model: nn.Module, path: Path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, str(path)).eval()
