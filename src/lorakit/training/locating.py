"""Find a model: a folder, a .gguf file, or the hub. A model that is found nowhere is an error at once, without retries.

An existing local path always wins over a hub id, and then nothing is fetched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.errors import LoraError
from ..core.paths import expanded
from ..core.reading import json_of, refuse_pointer
from ..core.words import first_line
from .at_hub import HubKind, id_at_hub

_JSON = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("model.safetensors.index.json", "adapter_config.json"),
)


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """The folder or hub id to load from, and the options it needs.

    Raises FileNotFoundError for any other name, with the folder that was perhaps meant; ValueError for a folder that
    holds several models.
    """
    path = Path(expanded(name))
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return _in_folder(name, path)
    if path.is_file():
        raise FileNotFoundError(f"{name} is a file; a model is a folder, a .gguf file or a hub id.")
    return id_at_hub(expanded(name), _MODEL), {}


@contextlib.contextmanager
def reading(name: str, folder: str) -> Iterator[None]:
    """Turn what libraries raise while they read a model into a ValueError that names what is broken.

    Errors for a lack of memory or of packages are left unchanged.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
            raise
        _refuse_broken(Path(folder))
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
        raise LoraError(f"{name} cannot be loaded: {kind}{reason[:300]}") from error


def _in_folder(name: str, path: Path) -> tuple[str, dict[str, Any]]:
    if (path / "config.json").is_file() or (path / "tokenizer_config.json").is_file():
        return str(path), {}
    packed = sorted(path.glob("*.gguf"))
    if len(packed) > 1:
        listed = ", ".join(file.name for file in packed)
        raise LoraError(f"{name} holds several .gguf files ({listed}); name one: --model {name}/{packed[0].name}")
    if packed:
        return str(path), {"gguf_file": packed[0].name}
    inside = [entry.name for entry in sorted(path.iterdir()) if _is_model(entry)]
    hint = f" Did you mean {str(path / inside[0])!r}?" if inside else ""
    raise FileNotFoundError(f"{name} is no model folder: it has no config.json and no .gguf file.{hint}")


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return any((path / own).is_file() for own in ("config.json", "adapter_config.json")) or any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


_MODEL = HubKind(
    word="model",
    place="folder",
    address="",
    is_one=_is_model,
    is_file=lambda path: path.suffix in (".gguf", ".safetensors", ".bin"),
    is_cached=_is_cached,
    ask=lambda hub, name, seconds: hub.model_info(name, timeout=seconds),
)


def _refuse_broken(folder: Path) -> None:
    """Raise ValueError for the first broken file of a model's folder."""
    import safetensors

    for path in filter(Path.is_file, map(folder.joinpath, _JSON)):
        json_of(path, dict)
    for path in sorted(folder.glob("*.safetensors")):
        refuse_pointer(path)
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise LoraError(f"{path}: no complete safetensors file: {first_line(error)}.") from None
    for path in sorted([*folder.glob("*.gguf"), *folder.glob("*.bin"), *folder.glob("*.model")]):
        refuse_pointer(path)
