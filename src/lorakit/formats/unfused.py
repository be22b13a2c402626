"""Adapters for programs with a layer for each expert, as transformers 4 had them: `renamed.py` the other way round.

    X.experts.gate_up_proj  A (experts, r, in), B (experts, 2·inner, r)    X.experts.3.gate_proj   A₃, B₃[:inner]
                                                                           X.experts.3.up_proj     A₃, B₃[inner:]
    X.experts.down_proj     A (experts, r, inner), B (experts, out, r)     X.experts.3.down_proj   A₃, B₃

with the names that transformers' rules for older base models start from: Mixtral's are block_sparse_moe.experts.3.w1.
The update is the same to the last bit and has the same rank, or less: columns of B that are zero for all experts of a
layer are left out, with their rows of A. What two layers share stands in the file twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..core.adapter import Adapter, Update
from ..core.errors import LoraError
from ..core.host import Host
from ..core.layouts import Matrix, Stack
from ..core.targets import matching
from .renamed import renaming, rules_of

_WEIGHT = ".weight"


def unfused(adapter: Adapter, host: Host) -> Adapter:
    """`adapter`, which is of this model, by the layers and names of transformers 4.

    Raises LoraError for a stack that was never anything else (GPT-OSS, Llama 4).
    """
    found = rules_of(host.model, add_legacy=False)
    loading, rules = (None, []) if found is None else found
    # As transformers saves a base model: a prefix says where the model was loaded from, and nothing about its layers.
    rules = [rule.reverse_transform() for rule in rules[::-1] if type(rule).__name__ != "PrefixChange"]
    splitting = [rule for rule in rules if hasattr(rule, "operations")]
    older = _older_names(host.model, loading, [rule for rule in rules if not hasattr(rule, "operations")])
    updates: dict[str, Update] = {}
    ends: set[str] = set()
    for name, update in adapter.updates.items():
        if isinstance(update.layout, Stack):
            own = _experts(name, update, splitting, older, host)
            ends |= {_end(part, 3) for part in own}
        else:
            own = _layer(name, update, older)
            ends |= {_end(part, 2) for part in own.keys() - {name}}
        updates |= own
    kept = [name for name in updates if name in adapter.updates]
    targets = {target for target in adapter.targets if matching(target, kept)}
    return dataclasses.replace(
        adapter,
        updates=updates,
        trained={older(name): value for name, value in adapter.trained.items()},
        also_train=tuple(older(f"{module}{_WEIGHT}").removesuffix(_WEIGHT) for module in adapter.also_train),
        targets=tuple(sorted(targets | ends)),
        token_rows={older(f"{name}{_WEIGHT}").removesuffix(_WEIGHT): rows for name, rows in adapter.token_rows.items()},
    )


def _older_names(model: Any, loading: Any, renamings: list[Any]) -> Callable[[str], str]:
    """A key → its name in transformers 4, where today's rules lead from there to here."""
    forward = renaming(model)

    def older(key: str) -> str:
        if forward is None:
            return key
        before = loading.apply_renamings(key, renamings)
        return before if forward[0](before)[1] == forward[0](key)[1] else key

    return older


def _layer(name: str, update: Update, older: Callable[[str], str]) -> dict[str, Update]:
    """The update of what is no stack. A router's own matrix was the weight of a linear layer."""
    if update.parameter and name.endswith(_WEIGHT):
        return {older(name).removesuffix(_WEIGHT): dataclasses.replace(update, parameter="")}
    if update.parameter:
        return {older(name): update}
    return {older(name + _WEIGHT).removesuffix(_WEIGHT): update}


def _experts(name: str, update: Update, rules: list[Any], older: Callable[[str], str], host: Host) -> dict[str, Update]:
    """An update for each layer of each expert in the stack of this name."""
    for rule in rules:
        first, matched = rule.rename_source_key(name)
        *splits, last = ((type(own).__name__, getattr(own, "dim", None)) for own in rule.operations)
        if matched is not None and splits in ([], [("Chunk", 1)]) and last == ("SplitModulelist", 0):
            break
    else:
        raise LoraError(
            f"{name}: transformers has never had a layer for each expert of {type(host.model).__name__}, so there are "
            "no names for a file of single experts. Save it with experts='stacked'."
        )
    patterns = rule.target_patterns
    found: dict[str, Update] = {}
    for pattern, rows in zip(patterns, update.B.chunk(len(patterns), 1), strict=True):
        # A pair that was read from such a file has zeros where the other one of the two is.
        used = rows.ne(0).any(1).any(0)
        used = used if used.any() else ~used
        for expert, (A, B) in enumerate(zip(update.A[:, used], rows[:, :, used], strict=True)):
            key = older(first.replace(patterns[0], pattern).replace("*", str(expert)))
            found[key.removesuffix(_WEIGHT)] = update.with_factors(Matrix(), A.clone(), B.clone(), parameter="")
    return found


def _end(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])
