"""Make a `Study` from the folders that `lorakit analyze` is given: find base weights, read, note what is missing."""

from __future__ import annotations

import json
from pathlib import Path

from ...core.adapter import Adapter
from ...core.paths import expanded
from ...formats import peft, read_for
from ...formats.folder import OutputKind
from ...training.adapter_folder import check_adapter
from ...training.bars import progress_bar
from ...training.models import load_with_adapter
from .measures import analyze, factors_of, matched, similarities
from .report import Study


def _is_released(folder: Path) -> bool:
    try:
        found = json.loads((folder / "analysis.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"adapter", "base", "modules", "similarities"} <= found.keys()


# An analysis may be written into any folder, for example beside the adapter.
_FILES = r"analysis\.(json|html)"
ANALYSIS = OutputKind("analyze", names=_FILES, released=_is_released)


def study_of(adapter: str, other: str | None = None, model: str | None = None, *, dtype: str = "float32") -> Study:
    """Analyze the adapter's folder, and compare it with the folder `other`.

    model: the base; None: the base that the adapter names, if it is on this machine. Nothing is downloaded unless
    `model` is a hub id. Raises FileNotFoundError, or ValueError for adapters that do not fit the base or each other.
    """
    for folder in filter(None, (adapter, other)):
        check_adapter(folder)
    first = peft.stored_adapter(adapter)
    second = None if other is None else peft.stored_adapter(other)
    factors_of(first)  # raises before a model is loaded if it cannot be analyzed
    if second is not None:
        matched(first, second)
    base = model or local_base(first.base_model)
    notes = _notes(first, base)
    loaded = None
    if base is None:
        first, second = peft.read(adapter), None if other is None else peft.read(other)
    else:
        loaded = load_with_adapter(base, adapter, dtype=dtype).model
        first = read_for(loaded, adapter)  # some names in a file can be resolved only with the model
        second = None if other is None else read_for(loaded, other)
    matrices = progress_bar(analyze(first, loaded), total=len(factors_of(first)), doing="matrices")
    return Study(
        adapter=adapter,
        base=base,
        modules=tuple(matrices),
        other=other,
        similarities=() if second is None else tuple(similarities(first, second)),
        notes=notes,
    )


def local_base(name: str | None) -> str | None:
    """Where the base model of this name is on this machine: an existing path, or a hub id's folder in the hub's cache.

    None if it is not on this machine, or if the cache holds no weights.
    """
    if not name:
        return None
    if Path(expanded(name)).exists():
        return name
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path on another machine
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return str(folder) if any([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]) else None


def _notes(adapter: Adapter, base: str | None) -> tuple[str, ...]:
    """A line for everything that the tables do not show."""
    notes = []
    if base is None:
        named = f"{adapter.base_model!r} is not on this machine" if adapter.base_model else "the adapter names none"
        notes.append(f"without a base model what needs W is left out: {named}; give it with --model.")
    if any(update.magnitude is not None for update in adapter.updates.values()):
        notes.append("DoRA: ΔW is s·B A; the gain of the rows enters /‖W‖ and intruders, where W is known.")
    if adapter.trained:
        shown = ", ".join(list(adapter.trained)[:4]) + (", …" if len(adapter.trained) > 4 else "")
        notes.append(f"trained whole, with no low rank to analyze: {shown}.")
    if adapter.token_rows:
        notes.append(f"trained rows of token tables, with no low rank to analyze: {', '.join(adapter.token_rows)}.")
    return tuple(notes)
