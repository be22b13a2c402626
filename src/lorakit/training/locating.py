"""Where a model is: a folder, a .gguf file, or the hub. What is found nowhere is an error at once, not after retries.

An existing local path always wins over a hub id, and then nothing is fetched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.reading import json_of, missing, refuse_pointer
from ..core.words import suggestion

_HUB = "https://huggingface.co/"
_JSON = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json"),
    *("model.safetensors.index.json", "adapter_config.json"),
)
_SECONDS = 10  # to wait for the hub's answer to whether it has a model


def locate(name: str) -> tuple[str, dict[str, Any]]:
    """The folder or hub id to load from, and the options it needs.

    Raises FileNotFoundError for what is neither, naming the folder that was perhaps meant; ValueError for a folder
    that holds several models.
    """
    path = _expanded(name)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        return _in_folder(name, path)
    if path.is_file():
        raise FileNotFoundError(f"{name} is a file; a model is a folder, a .gguf file or a hub id.")
    if name.startswith(_HUB):  # as a browser shows it: surely the hub's, whatever lies here
        name = "/".join(name.removeprefix(_HUB).split("/")[:2])
        _ask_hub(name, "")
        return name, {}
    if _is_path(name, path):
        raise FileNotFoundError(f"no model at {missing(path)}")
    near = _near_model(path)
    if not _is_cached(name):
        if near:
            raise FileNotFoundError(f"no model at {name}.{near} For the hub's model of that name: {_HUB}{name}")
        _ask_hub(name, suggestion(path.name, [entry.name for entry in _entries(path.parent)]))
    return name, {}


@contextlib.contextmanager
def reading(name: str, folder: str) -> Iterator[None]:
    """Whatever the libraries underneath raise while they read a model becomes a ValueError that names what is broken.

    Lack of memory and of packages is left as it is.
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
        raise ValueError(f"{name} cannot be loaded: {kind}{reason[:300]}") from error


def _in_folder(name: str, path: Path) -> tuple[str, dict[str, Any]]:
    if (path / "config.json").is_file() or (path / "tokenizer_config.json").is_file():
        return str(path), {}
    packed = sorted(path.glob("*.gguf"))
    if len(packed) > 1:
        listed = ", ".join(file.name for file in packed)
        raise ValueError(f"{name} holds several .gguf files ({listed}); name one: --model {name}/{packed[0].name}")
    if packed:
        return str(path), {"gguf_file": packed[0].name}
    inside = [entry.name for entry in sorted(path.iterdir()) if _is_model(entry)]
    hint = f" Did you mean {str(path / inside[0])!r}?" if inside else ""
    raise FileNotFoundError(f"{name} is no model folder: it has no config.json and no .gguf file.{hint}")


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~somebody without a home
        return Path(name)


def _is_path(name: str, path: Path) -> bool:
    """Whether a name that does not exist can be no hub id, or is plainly not meant as one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # named in no __all__

    if path.is_absolute() or name.startswith((".", "~")) or name.endswith("/") or "\\" in name:
        return True
    if path.suffix in (".gguf", ".safetensors", ".bin") or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return False


def _near_model(path: Path) -> str:
    """Did you mean …?, where a model or an adapter of nearly that name lies here."""
    parents = [path.parent]
    if not path.parent.is_dir():
        parents = [own for own in _entries(Path()) if own.is_dir() and suggestion(path.parent.name, [own.name])]
    models = [str(entry) for parent in parents for entry in _entries(parent) if _is_model(entry)]
    return suggestion(str(path), models, cutoff=0.8)


def _is_model(path: Path) -> bool:
    if path.is_dir():
        return any((path / own).is_file() for own in ("config.json", "adapter_config.json")) or any(path.glob("*.gguf"))
    return path.suffix == ".gguf"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _ask_hub(name: str, hint: str) -> None:
    """Raise FileNotFoundError if the hub does not have the model or does not answer.

    transformers would ask for each file in turn, and again for each that fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=_SECONDS)
    except GatedRepoError:
        raise FileNotFoundError(
            f"{name}: the hub asks for a login and for consent to its terms: {_HUB}{name}"
        ) from None
    except RepositoryNotFoundError:
        raise FileNotFoundError(f"no folder {name!r} here, and the hub has no such model.{hint}") from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(f"no folder {name!r} here, and the hub answers: {_first_line(error)}{hint}") from None
    except Exception as error:  # each HTTP library has its own for a network that is not there
        why = _first_line(error) or type(error).__name__
        raise FileNotFoundError(f"no folder {name!r} here, and the hub is not reached ({why}).{hint}") from None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


def _refuse_broken(folder: Path) -> None:
    """Raise ValueError for the first file of a model's folder that is not what its name says."""
    import safetensors

    for path in filter(Path.is_file, map(folder.joinpath, _JSON)):
        json_of(path, dict)
    for path in sorted(folder.glob("*.safetensors")):
        refuse_pointer(path)
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path}: no complete safetensors file: {_first_line(error)}.") from None
    for path in sorted([*folder.glob("*.gguf"), *folder.glob("*.bin"), *folder.glob("*.model")]):
        refuse_pointer(path)
