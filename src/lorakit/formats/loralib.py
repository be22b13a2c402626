"""loralib's file: `torch.save(lora_state_dict(model))`, tensors by name and nothing else.

    <module>.lora_A, <module>.lora_B, and biases as <module>.bias

It holds no alpha, so reading asks for one, and no layer kind, so reading asks how the model's layers lay out their
factors. Files are read with `weights_only=True`: a pickle that wants to run code is refused. microsoft/LoRA's training
script wraps the tensors as {"model_state_dict": …}; both forms are read.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, Layout, Update
from .files import replacing


def write(adapter: Adapter, path: str | Path) -> None:
    """Write `adapter` as loralib does. Raises ValueError for what loralib has no layer for, and for several alphas."""
    alphas = sorted({update.alpha for update in adapter.updates.values()})
    if len(alphas) > 1:
        raise ValueError(
            f"{path}: such a file is read with one alpha, and these layers have {', '.join(f'{a:g}' for a in alphas)}. "
            "Save into a folder (PEFT's format)."
        )
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        if update.kind == "conv" or update.magnitude is not None or update.parameter:
            what = (
                "a parameter"
                if update.parameter
                else "a factored convolution"
                if update.kind == "conv"
                else "a DoRA layer"
            )
            raise ValueError(f"{name} is {what}, which loralib does not have. Save into a folder (PEFT's format).")
        # loralib's scale is α/r. A scale of rsLoRA is that one with another B.
        B = update.B * math.sqrt(update.rank) if update.rslora else update.B
        tensors |= {f"{name}.lora_A": update.A, f"{name}.lora_B": B}
    tensors |= adapter.trained
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(tensors, temporary)


def read(path: str | Path, alpha: float | None, layouts: Mapping[str, Layout]) -> Adapter:
    """The adapter in a loralib file. alpha: `lora_alpha` of the layers it was made with, which the file lacks."""
    if alpha is None:
        raise ValueError(
            f"{path} is a loralib file, which does not hold lora_alpha. Give the value used in training: alpha=16, say."
        )
    tensors = _read_tensors(Path(path))
    names = sorted({key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")})
    updates: dict[str, Update] = {}
    for name in names:
        if f"{name}.lora_B" not in tensors:
            raise ValueError(f"{path}: {name}.lora_A has no {name}.lora_B beside it.")
        A, B = tensors.pop(f"{name}.lora_A"), tensors.pop(f"{name}.lora_B")
        updates[name] = _update(A, B, alpha, layouts.get(name, Layout("linear")))
    biases = {key: tensor for key, tensor in tensors.items() if key.endswith("bias")}
    homeless = sorted(tensors.keys() - biases.keys())
    if homeless or not updates:
        listed = "\n".join(f"  {key}" for key in homeless[:20]) or "  (none)"
        raise ValueError(f"{path}: expected <module>.lora_A, <module>.lora_B and biases; found beside them:\n{listed}")
    own = all(key.removesuffix(".bias") in updates for key in biases)
    return Adapter(updates, trained=biases, bias="none" if not biases else "lora_only" if own else "all")


def _update(A: Tensor, B: Tensor, alpha: float, layout: Layout) -> Update:
    rank = {"merged_linear": B.shape[1], "conv_loralib": A.shape[0] // layout.kernel_last}.get(layout.kind, A.shape[0])
    return Update(layout.kind, A, B, rank, alpha, blocks=layout.blocks)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not read: it is no file of plain tensors ({reason})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model_state_dict"), dict):
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}.")
    return dict(loaded)
