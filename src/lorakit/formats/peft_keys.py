"""The keys of PEFT's tensors, as programs in the wild write them, and what each one names.

PEFT itself writes `base_model.model.<module>.lora_A.weight`. Keys in files may also have the parts that wrappers add to
names (`core/names.py`), at the beginning or inside, the adapter's name (`lora_A.default.weight`), or no prefix at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..core import names
from ..core.errors import LoraError
from .foreign import format_by_keys
from .peft_config import PeftConfig
from .peft_names import without_peft_wrappers

PREFIX = "base_model.model."
_FACTORS: dict[str, tuple[str, bool]] = {  # end of the key → (Update field, of an embedding)
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
    ".lora_magnitude_vector": ("magnitude", False),
    ".lora_magnitude_vector.weight": ("magnitude", False),
}
_ADAPTER_NAME = re.compile(
    r"(\.lora_(?:A|B|magnitude_vector))\.([^.]+)(?=\.weight$|\.bias$)"
    r"|(\.lora_(?:embedding_A|embedding_B|magnitude_vector))\.(?!weight$)([^.]+)$"
    r"|(\.modules_to_save)\.([^.]+)(?=\.)"
    r"|(\.token_adapter\.trainable_tokens_delta)\.([^.]+)$"
)
_OF_A_LAYER = re.compile(r"lora_([A-Z]|embedding_[A-Z]|magnitude_vector|diag|arrow|velora_\w+|monteclora_\w+)")
_UNUSED = (".lora_velora_embed",)  # these serve only the backward pass
ROWS = ".token_adapter.trainable_tokens_delta"  # PEFT's name for rows of a token table, which are no difference
AROUND_ROWS = ".token_adapter.base_layer"  # what PEFT puts around the table
_COPIES = ".original_module."  # with bias="all" PEFT also saves the untrained copy of a head's bias


@dataclass
class Sorted:
    """The tensors of a file, sorted by their role."""

    factors: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path → A, B, magnitude
    embeddings: set[str] = field(default_factory=set)  # the paths among them that are embeddings
    trained: dict[str, Tensor] = field(default_factory=dict)  # full parameter name → value
    rows: dict[str, Tensor] = field(default_factory=dict)  # path of a token table → its trained rows


def sort(tensors: Mapping[str, Tensor], config: PeftConfig, where: str, known: Collection[str] | None) -> Sorted:
    """The role of each tensor. known: the names of the model's modules, if there is a model.

    where: the file, for errors. Raises LoraError listing every key that has no place. PEFT drops such tensors silently.
    """
    keys = _without_wrappers(tensors, where, known)
    found = Sorted()
    homeless: list[str] = []
    for path, key in sorted(keys.items()):
        if _COPIES in path or path.endswith(_UNUSED):
            continue
        path = path.replace(f"{AROUND_ROWS}.", ".")
        if path.endswith(ROWS):
            found.rows[path.removesuffix(ROWS)] = tensors[key]
            continue
        suffix = next((end for end in _FACTORS if path.endswith(end)), None)
        if suffix is not None and path != suffix:
            name = path.removesuffix(suffix)
            what, embedding = _FACTORS[suffix]
            found.factors.setdefault(name, {})[what] = tensors[key]
            found.embeddings |= {name} if embedding else set()
        elif (".token_adapter." in path or _of_a_layer(path)) and not _saved(path, config):
            homeless.append(key)
        else:
            found.trained[without_peft_wrappers(path)] = tensors[key]
    for name, parts in list(found.factors.items()):
        if not {"A", "B"} <= parts.keys():
            homeless.append(f"{name}.lora_*")
    theirs = None if found.factors else format_by_keys(tensors)
    if homeless or theirs or not (found.factors or found.trained or found.rows):
        listed = "\n".join(f"  {key}" for key in (homeless or sorted(tensors))[:20]) or "  (no tensor at all)"
        foreign = f"\nSuch keys are of {theirs}." if theirs else ""
        raise LoraError(f"{where}: keys that no LoRA layer of lorakit has:\n{listed}{foreign}")
    return found


def saved_whole(config: PeftConfig, trained: Collection[str]) -> tuple[str, ...]:
    """The modules in which trained tensors lie and that `modules_to_save` names.

    PEFT compares the ends of names as texts: "norm" also matches input_layernorm.
    """
    hits = {module for name in trained for module in _modules_around(name) if module.endswith(config.modules_to_save)}
    return tuple(sorted(name for name in hits if not any(name.startswith(f"{outer}.") for outer in hits)))


def _of_a_layer(path: str) -> bool:
    """Whether a part of `path` is a name in PEFT's layers. The user's own modules may begin with lora_ too."""
    return any(_OF_A_LAYER.fullmatch(part) for part in path.split("."))


def _saved(path: str, config: PeftConfig) -> bool:
    return any(module.endswith(config.modules_to_save) for module in _modules_around(path))


def _modules_around(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts))]


def _without_wrappers(tensors: Mapping[str, Tensor], where: str, known: Collection[str] | None) -> dict[str, str]:
    """Each path without wrappers, PEFT's prefix and the adapter's name, with its key in the file."""
    found: dict[str, str] = {}
    adapters: set[str] = set()
    for key in tensors:
        path, adapter = _without_adapter_name(names.unwrapped_name(key))
        adapters |= {adapter} if adapter else set()
        path = _without_prefixes(path, known)
        if path in found:
            if len(adapters) > 1:
                break
            raise LoraError(f"{where}: {found[path]} and {key} are the same tensor of the model.")
        found[path] = key
    if len(adapters) > 1:
        raise LoraError(f"{where} holds several adapters ({', '.join(sorted(adapters))}): give each a file of its own.")
    return found


def _without_adapter_name(key: str) -> tuple[str, str]:
    match = _ADAPTER_NAME.search(key)
    if match is None:
        return key, ""
    kept, name = [group for group in match.groups() if group is not None]
    return f"{key[: match.start()]}{kept}{key[match.end() :]}", name


def _without_prefixes(path: str, known: Collection[str] | None) -> str:
    """`path` without PEFT's prefix, and without DistributedDataParallel's `module.` before and after it.

    A name of the model itself that begins in the same way stays.
    """
    if path.removeprefix("module.").startswith(PREFIX):
        path = path.removeprefix("module.").removeprefix(PREFIX)
    while path.partition(".")[0] not in (known or ()):
        shorter = path.removeprefix(PREFIX).removeprefix("module.")
        if shorter == path:
            break
        path = shorter
    return path
