"""Adapters that are older than a renaming or fusing of modules in transformers, translated to today's names.

transformers 5 moved the text towers of vision models and fused experts into one stack of matrices. For each
architecture it keeps the rules by which it reads older base models (`transformers.conversion_mapping`). The same rules
say where an older update belongs:

    renamed         a layer has another name
    chunked         one layer became several: each takes its own rows of B, and all of A
    concatenated    several layers became one: A = [A₁; A₂], B = diag(B₁, B₂)
    merged          a layer for each expert became a stack: A (experts, r, in), B (experts, out, r). Layers that were
                    concatenated as well are treated as above for each expert. A layer without an update counts as zero.

If A₁ = A₂, the factor is taken once: A = A₁, B = [B₁; B₂].

PEFT makes the same translation if all the layers that became one were adapted.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, Update
from ..core.errors import LoraError
from ..core.host import Host
from ..core.layouts import Matrix

_WEIGHT = ".weight"


def translated(adapter: Adapter, host: Host) -> Adapter:
    """`adapter` with updates and tensors under the names that the model has today.

    What no rule leads to a module of the model keeps its name. Raises LoraError if a rule leads an update to a module
    that it does not fit, and for DoRA's magnitude of a layer that is now a part of another.
    """
    known = {*host.modules, *host.parameters}
    routers = {name for name in adapter.updates if "weight" in host.matrices.get(name, ())}
    if not routers and known.issuperset({*adapter.updates, *adapter.trained, *adapter.token_rows}):
        return adapter
    adapter = dataclasses.replace(
        adapter, updates={_own_weight(name, host): update for name, update in adapter.updates.items()}
    )
    rules = renaming(host.model)
    if rules is None:
        return adapter
    rename, converters = rules
    updates: dict[str, Update] = {}
    fused: dict[str, list[_Source]] = {}
    for name, update in sorted(adapter.updates.items(), key=lambda item: in_order(item[0])):
        new, plain, pattern = (name, name, None) if name in known else rename(name + _WEIGHT)
        if pattern is None:
            new = new.removesuffix(_WEIGHT) if name not in known else name
            updates[_own_weight(new, host) if new in known else name] = update
        else:
            fused.setdefault(new, []).append(_Source(name, plain, pattern, update))
    for target, sources in fused.items():
        updates |= _fused(target, sources, converters[sources[0].pattern], host)
    moved = {name: name if name in known else rename(name)[0] for name in adapter.trained}
    moved = {name: new if new in known else name for name, new in moved.items()}
    return dataclasses.replace(
        adapter,
        updates=updates,
        trained={moved[name]: value for name, value in adapter.trained.items()},
        also_train=tuple(sorted({_moved_module(module, moved) for module in adapter.also_train})),
        token_rows={
            name if name in known else rename(name + _WEIGHT)[0].removesuffix(_WEIGHT): rows
            for name, rows in adapter.token_rows.items()
        },
    )


@dataclasses.dataclass(frozen=True)
class _Source:
    """An update that became a part of another."""

    name: str
    key: str  # its weight's, after all rules but the fusing
    pattern: str  # of the rule
    update: Update

    @property
    def expert(self) -> int:
        """The number that stands where the rule's pattern has its star."""
        match = re.search(re.escape(self.pattern).replace(r"\*", r"(\d+)"), self.key)
        return int(match[1]) if match and match.groups() else 0


Rename = Callable[[str], tuple[str, str, "str | None"]]


def rules_of(model: Any, **wanted: Any) -> tuple[Any, list[Any]] | None:
    """transformers' module that applies rules to names, and the rules for this model.

    None for a model that is not of transformers, or if its version is older than 5 and has no rules.
    wanted: arguments of transformers' `get_model_conversion_mapping`.
    """
    # Nothing is imported: a model of transformers has imported these already, if its version has them (5 and later).
    mapping, loading, modeling = (
        sys.modules.get(f"transformers.{name}")
        for name in ("conversion_mapping", "core_model_loading", "modeling_utils")
    )
    if mapping is None or loading is None or modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return None
    return loading, mapping.get_model_conversion_mapping(model, **wanted)


def renaming(model: Any) -> tuple[Rename, Mapping[str, Any]] | None:
    """What transformers' rules for this model say about names, or None as `rules_of`.

    The first result maps a key to its name today, its name before fusing, and the pattern of the rule that fuses it.
    The second one maps each such pattern to its rule.
    """
    found = rules_of(model)
    if found is None:
        return None
    loading, rules = found
    converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, loading.WeightConverter)]
    own = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    stored = dict(itertools.chain(*own))

    def rename(key: str) -> tuple[str, str, str | None]:
        new, pattern = loading.rename_source_key(key, renamings, converters, model.base_model_prefix, stored)
        return new, loading.apply_renamings(key, renamings), pattern

    return rename, {pattern: rule for rule in converters for pattern in rule.source_patterns}


def _fused(target: str, sources: Sequence[_Source], rule: Any, host: Host) -> dict[str, Update]:
    """The updates that `rule` makes of `sources`, by name."""
    operations = [type(operation).__name__ for operation in rule.operations]
    dims = [getattr(operation, "dim", None) for operation in rule.operations]
    if operations == ["Chunk"] and dims == [0]:
        return _chunked(target, sources[0].update, rule.target_patterns)
    if operations == ["Concatenate"] and dims == [0]:
        return {target.removesuffix(_WEIGHT): _concatenated(target, sources, rule.source_patterns, host)}
    if operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and dims in ([0], [0, 1]):
        return {target: _merged(target, sources, rule.source_patterns, host)}
    raise LoraError(
        f"{sources[0].name}: transformers made {target} of it ({', '.join(operations)}), and an update does not go "
        "through that. Load the adapter with the transformers that it was made with."
    )


def _chunked(target: str, update: Update, patterns: Sequence[str]) -> dict[str, Update]:
    if not isinstance(update.layout, Matrix) or update.B.shape[0] % len(patterns):
        raise LoraError(
            f"{target}: a {update.kind} update of {update.B.shape[0]} rows is not of {len(patterns)} layers."
        )
    found: dict[str, Update] = {}
    for number, (pattern, B) in enumerate(zip(patterns, update.B.chunk(len(patterns)), strict=True)):
        magnitude = None if update.magnitude is None else update.magnitude.chunk(len(patterns))[number].clone()
        name = target.replace(patterns[0], pattern, 1).removesuffix(_WEIGHT)
        found[name] = dataclasses.replace(update, B=B.clone(), magnitude=magnitude)
    return found


def _concatenated(target: str, sources: Sequence[_Source], patterns: Sequence[str], host: Host) -> Update:
    weight = host.parameters.get(target)
    if weight is None or any(source.update.magnitude is not None for source in sources):
        raise LoraError(f"{sources[0].name}: it is a part of {target} now, where its update has no place.")
    outputs, inputs = weight.shape
    A, B = _blocks({source.pattern: source for source in sources}, patterns, outputs, inputs)
    first = sources[0].update
    return Update(Matrix(), A, B, A.shape[0], first.scale * A.shape[0])


def _merged(target: str, sources: Sequence[_Source], patterns: Sequence[str], host: Host) -> Update:
    stack = host.stack(target)
    if stack is None:
        raise LoraError(f"{sources[0].name}: it is a part of {target} now, which {type(host.model).__name__} lacks.")
    if any(source.update.magnitude is not None for source in sources):
        raise LoraError(f"{sources[0].name}: DoRA has no meaning in {target}, the stack of all experts.")
    layout, (experts, outputs, inputs) = stack
    by_expert: dict[int, dict[str, _Source]] = {}
    for source in sources:
        by_expert.setdefault(source.expert, {})[source.pattern] = source
    if max(by_expert) >= experts:
        raise LoraError(f"{sources[0].name}: the adapter is for {max(by_expert) + 1} experts, the model has {experts}.")
    scale = sources[0].update.scale
    pairs = {expert: _blocks(own, patterns, outputs, inputs, scale) for expert, own in by_expert.items()}
    rank = max(A.shape[0] for A, _ in pairs.values())
    like = sources[0].update.A
    A, B = like.new_zeros(experts, rank, inputs), like.new_zeros(experts, outputs, rank)
    for expert, (own_A, own_B) in pairs.items():
        A[expert, : len(own_A)], B[expert, :, : len(own_A)] = own_A, own_B
    return Update(layout, A, B, rank, scale * rank, parameter=target.rpartition(".")[2])


def _blocks(
    sources: Mapping[str, _Source], patterns: Sequence[str], outputs: int, inputs: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """A (Σrᵢ, inputs) and B (outputs, Σrᵢ) of the layers that became one, in the rule's order, with one common scale.

    The layers without an update share the outputs that the others leave. Layers with the same A need it only once.
    """
    scale = next(iter(sources.values())).update.scale if scale is None else scale
    given = {pattern: source.update.B.shape[0] for pattern, source in sources.items()}
    missing = len(patterns) - len(given)
    left = (outputs - sum(given.values())) // missing if missing else 0
    row = 0
    parts_A: list[Tensor] = []
    parts_B: list[Tensor] = []
    for pattern in patterns:
        source = sources.get(pattern)
        if source is not None:
            update = source.update
            if (
                not isinstance(update.layout, Matrix)
                or update.A.shape[1] != inputs
                or row + update.B.shape[0] > outputs
            ):
                raise LoraError(
                    f"{source.name}: A {tuple(update.A.shape)} and B {tuple(update.B.shape)} are no part of an "
                    f"update of {outputs} × {inputs}."
                )
            B = update.B.new_zeros(outputs, update.rank)
            B[row : row + update.B.shape[0]] = update.B * (update.scale / scale)
            same = next((part for part, A in enumerate(parts_A) if torch.equal(A, update.A)), None)
            if same is None:
                parts_A.append(update.A)
                parts_B.append(B)
            else:
                parts_B[same] += B
        row += given.get(pattern, left)
    return torch.cat(parts_A), torch.cat(parts_B, 1)


def _own_weight(name: str, host: Host) -> str:
    """The name, or that of the weight if a layer became a module that multiplies by its own weight (a router)."""
    return name + _WEIGHT if "weight" in host.matrices.get(name, ()) else name


def _moved_module(module: str, moved: Mapping[str, str]) -> str:
    for name, new in moved.items():
        inside = name.removeprefix(module)
        if name.startswith(f"{module}.") and new.endswith(inside):
            return new.removesuffix(inside)
    return module


def in_order(name: str) -> list[tuple[int, str]]:
    """A key by which "2" sorts before "10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
