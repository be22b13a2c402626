"""loralib's file: `torch.save(lora_state_dict(model))`, tensors by name and nothing else.

    <module>.lora_A, <module>.lora_B, and biases as <module>.bias

It holds no alpha, so reading needs one, and no layer kind, so reading asks the model how its layers lay out their
factors. All other tensors belong to modules that were trained whole. Files are read with `weights_only=True`, so a
pickle that wants to run code is refused. microsoft/LoRA's training script wraps the tensors as
{"model_state_dict": …}. Both forms are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..core import names
from ..core.adapter import Adapter, Update
from ..core.errors import LoraError
from ..core.host import Host
from ..core.layouts import Kernel, Matrix
from ..core.trainable import Bias
from .files import check_tensors, read_pickled, replacing
from .foreign import format_by_keys
from .peft import FILES as PEFTS

name = "loralib"
limits = (
    "It holds neither alpha, which `load` must be given, nor the kinds of the layers, which the model tells. It has "
    "no DoRA, no factored convolution, no parameter that is read, no rows of a token table; all layers have one alpha."
)
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def recognises(path: Path) -> bool:
    """Whether the path has an ending that torch.save's files have, and is not one of PEFT's files or a folder."""
    return path.suffix in _SUFFIXES and path.name not in PEFTS and not path.is_dir()


def write(adapter: Adapter, path: str | Path) -> None:
    """Write `adapter` as loralib does. Raises LoraError for what loralib has no layer for, and for several alphas."""
    alphas = sorted({update.alpha for update in adapter.updates.values()})
    if len(alphas) > 1:
        raise LoraError(
            f"{path}: such a file is read with one alpha, and these layers have {', '.join(f'{a:g}' for a in alphas)}. "
            "Save into a folder (PEFT's format)."
        )
    if adapter.token_rows:
        raise LoraError(
            f"rows of {next(iter(adapter.token_rows))} were trained by themselves, and such a file does not say which. "
            "Save into a folder (PEFT's format)."
        )
    tensors: dict[str, Tensor] = {}
    for module, update in adapter.updates.items():
        if not update.layout.of_loralib or update.magnitude is not None or update.parameter:
            what = (
                "a parameter"
                if update.parameter
                else "a factored convolution"
                if isinstance(update.layout, Kernel)
                else "a DoRA layer"
            )
            raise LoraError(f"{module} is {what}, which loralib does not have. Save into a folder (PEFT's format).")
        # loralib's scale is α/r. Multiplying B by √r turns rsLoRA's α/√r into it.
        B = update.B * math.sqrt(update.rank) if update.rslora else update.B
        tensors |= {f"{module}.lora_A": update.A, f"{module}.lora_B": B}
    tensors |= adapter.trained
    check_tensors(tensors, f"{path} is not saved: ")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(tensors, temporary)


def read(path: str | Path, host: Host | None = None, alpha: float | None = None) -> Adapter:
    """The adapter in a loralib file. alpha: the `lora_alpha` used in training, which the file lacks.

    host: the model, which tells how its layers lay out their factors. Without it, all are taken for linear layers.

    Raises FileNotFoundError, or LoraError for a missing alpha and for what is wrong with the file.
    """
    layouts = {} if host is None else host.layouts
    if alpha is None:
        raise LoraError(
            f"{path} is a loralib file, which does not hold lora_alpha. Give the value used in training: alpha=16, say."
        )
    if isinstance(alpha, bool) or not math.isfinite(alpha) or alpha == 0:
        raise LoraError(f"alpha={alpha}: expected a number other than 0.")
    tensors = _by_plain_names(read_pickled(Path(path)), path, layouts)
    check_tensors(tensors, f"{path}: ")
    updates: dict[str, Update] = {}
    for module in sorted({key.removesuffix(".lora_A") for key in tensors if key.endswith(".lora_A")}):
        if f"{module}.lora_B" not in tensors:
            raise LoraError(f"{path}: {module}.lora_A has no {module}.lora_B beside it.")
        A, B = tensors.pop(f"{module}.lora_A"), tensors.pop(f"{module}.lora_B")
        layout = layouts.get(module, Matrix())
        if A.dim() != 2 or B.dim() != 2 or layout.rank_of(A, B) < 1:
            raise LoraError(
                f"{path}: {module}: lora_A {tuple(A.shape)}, lora_B {tuple(B.shape)} are not a pair of factors."
            )
        updates[module] = Update(layout, A, B, layout.rank_of(A, B), alpha)
    homeless = sorted(key for key in tensors if not updates or _of_an_adapted_layer(key, updates))
    if homeless or not updates:
        listed = "\n".join(f"  {key}" for key in homeless[:20]) or "  (none)"
        theirs = format_by_keys(tensors) if not updates else None
        foreign = f"\nSuch keys are of {theirs}." if theirs else ""
        raise LoraError(
            f"{path}: expected <module>.lora_A, <module>.lora_B and biases; found beside them:\n{listed}{foreign}"
        )
    biases = {key for key in tensors if key.endswith("bias")}
    whole = {key.rpartition(".")[0] for key in tensors.keys() - biases}
    frozen = {key for key in biases if key.rpartition(".")[0] not in whole}
    own = all(key.removesuffix(".bias") in updates for key in frozen)
    bias: Bias = "none" if not frozen else "lora_only" if own else "all"
    return Adapter(updates, trained=tensors, also_train=tuple(sorted(whole)), bias=bias)


def _of_an_adapted_layer(key: str, updates: Mapping[str, Update]) -> bool:
    """Whether the key is an adapted layer's frozen weight, or a part of an update that lorakit does not know."""
    module, _, local = key.rpartition(".")
    frozen = local != "bias" and (module in updates or module.removesuffix(".conv") in updates)
    return frozen or local.startswith("lora_")


def _by_plain_names(tensors: Mapping[str, Tensor], path: str | Path, layers: Iterable[str]) -> dict[str, Tensor]:
    """The tensors by the names of the plain model (`core/names.py`). layers: the names of the model's layers."""
    wrapper = "" if any(name.startswith("module.") for name in layers) else "module."
    found = {names.unwrapped_name(key).removeprefix(wrapper): tensor for key, tensor in tensors.items()}
    if len(found) < len(tensors):
        raise LoraError(f"{path}: two of its names are the same tensor of the model.")
    return found
