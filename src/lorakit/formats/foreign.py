"""Adapter files of other programs: recognised by their keys, and refused with the name of their format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import safetensors

from ..core.errors import LoraError
from ..core.reading import refuse_pointer
from .files import read_pickled

_READS = "lorakit reads PEFT's folder (adapter_config.json, adapter_model.safetensors) and loralib's .pt file"
_TENSORS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".lora")
_SIGNS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("kohya's format (sd-scripts)", lambda key: key.startswith("lora_") and ".lora_" in key),
    ("the format of LyCORIS", lambda key: ".hada_w" in key or ".lokr_w" in key),
    ("diffusers' format", lambda key: ".lora.up." in key or ".lora.down." in key or "_lora.up." in key),
    ("diffusers' format", lambda key: key.startswith(("unet.", "transformer.", "text_encoder.")) and ".lora_A" in key),
    ("mlx-lm's format", lambda key: key.endswith((".lora_a", ".lora_b"))),
    ("torchtune's format", lambda key: key.endswith((".lora_a.weight", ".lora_b.weight"))),
    ("NeMo's format", lambda key: ".adapter_layer." in key or ".linear_in.weight" in key),
    ("PEFT's format", lambda key: key.endswith((".lora_A.weight", ".lora_embedding_A", ".lora_A.default.weight"))),
    ("loralib's format", lambda key: key.endswith(".lora_A")),
)


def format_by_keys(keys: Iterable[str]) -> str | None:
    """The name of the format that has such keys, or None if none is recognised."""
    keys = list(keys)
    return next((name for name, sign in _SIGNS if any(sign(key) for key in keys)), None)


def refuse(path: Path) -> None:
    """Raise LoraError that says what the file at `path` is and what lorakit reads."""
    what = _kind(path)
    again = " Put it into a folder with its adapter_config.json." if what and "PEFT" in what else ""
    raise LoraError(f"{path} is {what or 'no adapter that lorakit knows'}; {_READS}.{again}")


def contents(folder: Path) -> str:
    """A sentence about what a folder without adapter_config.json holds instead, or empty if nothing is recognised."""
    inside = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
    if inside:
        return f" Adapters are in it: {', '.join(str(folder / name) for name in inside[:5])}."
    files = sorted(path for path in folder.iterdir() if path.suffix in _TENSORS) if folder.is_dir() else []
    for path in files:
        what = _kind(path)
        if what is not None:
            return f" {path.name} in it is {what}; {_READS}."
    return ""


def _kind(path: Path) -> str | None:
    refuse_pointer(path)
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return "a GGUF file, the format of llama.cpp"
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as tensors:
                found = format_by_keys(tensors.keys())
        else:
            found = format_by_keys(read_pickled(path))
    except (ValueError, OSError, safetensors.SafetensorError):
        return None
    return f"a file in {found}" if found else None
