"""Files of adapters. They are written whole or not at all, and every error in reading names the file.

A reader raises FileNotFoundError if there is no file, and LoraError for anything wrong in it: another kind of file, a
file cut short, a git-lfs pointer, any other bytes. No code in a file is run.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.errors import LoraError
from ..core.reading import bytes_of
from ..core.words import first_line

# What libraries in other languages say about a failed write. None of them names the file.
_FAILED_WRITES = ("os error", "I/O error", "inline_container", "PytorchStreamWriter", "unexpected pos")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to. It is renamed to `path` if the block succeeds, and removed if it fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A write that fails inside, on a full disk, becomes an OSError that names `path` and the space that is left."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            if error.filename is not None or error.errno is None:  # it names the file already, or it is one of ours
                raise
            reason = error.strerror
        elif any(sign in str(error) for sign in _FAILED_WRITES):
            reason = first_line(error)
        else:
            raise
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free / 1e6
        raise OSError(f"{path} could not be written: {reason}. {free:,.1f} MB are free there.") from error


def sync(path: Path) -> None:
    """Wait until `path`, a file or a whole folder, is on the disk, so that a later rename cannot overtake it."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        if os.name == "nt":  # Windows does not open folders
            return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if there is one. A link is removed, and its target stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file. Raises LoraError naming the file."""
    data = _filled(path)
    try:
        # Not load_file, which leaks some bytes for each tensor (safetensors 0.8) and maps the file into memory.
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise LoraError(f"{path}: not a complete safetensors file ({error}).") from None
    except KeyError as error:
        raise LoraError(f"{path}: holds a tensor of type {error}, which this version of torch lacks.") from None


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors in a file of `torch.save`, by name. A pickle that wants to run code is refused.

    Raises LoraError naming the file for any bytes that are not such a file.
    """
    data = _filled(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # what unpickling raises depends on the bytes: KeyError, IndexError, RuntimeError, …
        reason = (str(error).splitlines() or [""])[0]
        kind = type(error).__name__
        raise LoraError(f"{path} is not read: it is no file of plain tensors ({kind}: {reason})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("model_state_dict"), dict):
        loaded = loaded["model_state_dict"]
    if not isinstance(loaded, dict):
        raise LoraError(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}.")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise LoraError(f"{path}: expected a dictionary of tensors by name, found {key!r}: {type(value).__name__}.")
    return dict(loaded)


def _filled(path: Path) -> bytes:
    data = bytes_of(path)
    if not data:
        raise LoraError(f"{path} is empty.")
    return data


def check_tensors(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that training cannot give: empty ones, NaN or infinite numbers, and integers.

    where: the beginning of the message ("<path>: "). Raises LoraError naming the tensor.
    """
    for key, tensor in tensors.items():
        if tensor.is_sparse or tensor.is_quantized or tensor.device.type == "meta":
            raise LoraError(f"{where}{key} is not a plain tensor of numbers ({tensor.layout}, {tensor.device}).")
        if tensor.numel() == 0:
            raise LoraError(f"{where}{key} is empty: a sharded model must be gathered before its adapter is saved.")
        if not tensor.is_floating_point() and not key.endswith("num_batches_tracked"):  # BatchNorm's counter
            raise LoraError(f"{where}{key} is stored as {tensor.dtype}: an adapter's numbers are of floating point.")
        # isfinite does not work on types of 8 bits.
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            raise LoraError(f"{where}{key} holds NaN or infinite numbers.")
