"""Choosing modules by name, and refusing those an adapter would silently miss.

A target is a glob over whole dotted names ("*.q_proj", "model.layers.[0-3].*"), the end of a name as PEFT takes it
("q_proj", "attn.q_proj"), or the word "all-linear". Every one of them must match something: a misspelt name among good
ones is the commonest way to train less than was meant (problem 4).

Dispatch is on the exact type. A subclass of `nn.Linear` may read its weight in a way of its own (quantised, sharded,
padded), and some parents read a child's weight without calling it; both are refused with the reason.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from .adapted import AdaptedLayer
from .layers import Conv1d, Conv2d, Conv3d, Embedding, Linear

ALL_LINEAR = "all-linear"
Filter = Callable[[nn.Module, str], bool]
Value = TypeVar("Value")

_LAYER_OF: dict[type[nn.Module], type[AdaptedLayer]] = {
    nn.Linear: Linear,
    nn.Embedding: Embedding,
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
}
# Named, not imported: transformers' linear layer with a transposed weight (GPT-2).
_TRANSFORMERS_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_ADAPTABLE = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)


@dataclass
class Selection:
    """Modules to adapt by name, and those that "all-linear" passed over with the reason."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def is_transposed(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D, a linear layer that stores its weight as (in, out)."""
    return (type(module).__module__, type(module).__qualname__) == _TRANSFORMERS_CONV1D


def layer_class(module: nn.Module) -> type[AdaptedLayer] | None:
    """The adapted class for a module of exactly this type, or None."""
    return Linear if is_transposed(module) else _LAYER_OF.get(type(module))


def select(model: nn.Module, targets: str | Iterable[str] | Filter) -> Selection:
    """The modules of `model` that `targets` names.

    Raises ValueError when a target matches nothing, or matches a module that cannot be adapted.
    """
    if callable(targets):
        return _by_filter(model, targets)
    patterns = [targets] if isinstance(targets, str) else list(targets)
    if not patterns:
        raise ValueError("targets is empty: name at least one module, or use 'all-linear'.")
    named = dict(model.named_modules(remove_duplicate=False))
    selection = Selection()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            _all_linear(model, selection)
        else:
            _by_pattern(model, named, pattern, patterns, selection)
    selection.modules = _without_duplicates(selection.modules)
    return selection


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob over whole names, or the end of a name, selects."""
    if _is_glob(pattern):
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return [name for name in names if name == pattern or name.endswith("." + pattern)]


def closest(pattern: str, names: Iterable[str]) -> str:
    """A sentence with the real names nearest to a misspelt one; empty when nothing is near."""
    by_suffix: dict[str, list[str]] = {}
    wanted = pattern.replace("*", "").strip(".")
    depth = wanted.count(".") + 1
    for name in names:
        by_suffix.setdefault(".".join(name.split(".")[-depth:]), []).append(name)
    near = difflib.get_close_matches(wanted, by_suffix, n=1, cutoff=0.5)
    if not near:
        return ""
    first, *more = by_suffix[near[0]]
    others = f" and {len(more)} like it" if more else ""
    suggestion = pattern.replace(wanted, near[0]) if wanted else near[0]
    return f"Closest: {first!r}{others}. Did you mean {suggestion!r}?"


def pattern_values(patterns: Mapping[str, Value], names: Sequence[str], what: str) -> dict[str, Value]:
    """The value for each name that some pattern of `what` (rank_pattern, say) selects; the first one wins."""
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        hits = matching(pattern, names)
        if not hits:
            raise ValueError(
                f"{what}={pattern!r} matches none of the adapted modules. {closest(pattern, names)}".rstrip()
            )
        for name in hits:
            values.setdefault(name, value)
    return values


def refusal(model: nn.Module, name: str, module: nn.Module) -> str | None:
    """Why `module` cannot be adapted, or None when it can."""
    kind = type(module).__name__
    if isinstance(module, AdaptedLayer):
        return (
            "it is adapted already; call lorakit.detach(model) first"
            if module.has_update
            else f"it is a {kind} made with r=0"
        )
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"{kind} is not supported: its weight is laid out (in, out/groups, *k)"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention | nn.TransformerEncoderLayer):
        return f"{type(parent).__name__} reads its weight without calling it, so an adapter would do nothing"
    if layer_class(module) is None:
        if isinstance(module, _ADAPTABLE):
            return f"{type(module).__module__}.{kind} is a subclass that may read its weight in a way of its own"
        inside = [child for child, inner in module.named_modules() if child and layer_class(inner)]
        hint = f"; inside it: {', '.join(inside[:6])}" if inside else ""
        return f"{kind} is no linear, embedding or convolution layer{hint}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other parameters (weight_norm, parametrisation)"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is stored as {weight.dtype}; load the model dequantised"
    if "forward" in module.__dict__:
        return "its forward is replaced on the instance (a device_map hook?), so changing its class would do nothing"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm={module.max_norm} renormalises the frozen weight in place at each lookup"
    return None


def _by_filter(model: nn.Module, wanted: Filter) -> Selection:
    selection = Selection()
    for name, module in model.named_modules():
        if name and wanted(module, name):
            _take(model, name, module, selection)
    if not selection.modules:
        raise ValueError(f"targets={wanted!r} selects no module of {type(model).__name__}.")
    return selection


def _by_pattern(
    model: nn.Module, named: dict[str, nn.Module], pattern: str, patterns: list[str], selection: Selection
) -> None:
    hits = matching(pattern, (name for name in named if name))
    if _is_glob(pattern):
        # A glob such as "*.attn*" may run over containers and norms; what it must not do is pass over a weight.
        hits = [name for name in hits if layer_class(named[name]) or isinstance(named[name], _ADAPTABLE)]
    if not hits:
        adaptable = [name for name, module in named.items() if layer_class(module)]
        message = (
            f"targets={patterns} match no module of {type(model).__name__}"
            if len(patterns) == 1
            else (f"target {pattern!r} matches no module of {type(model).__name__}")
        )
        raise ValueError(f"{message}.\n{closest(pattern, adaptable)}".rstrip())
    for name in hits:
        _take(model, name, named[name], selection)


def _take(model: nn.Module, name: str, module: nn.Module, selection: Selection) -> None:
    reason = refusal(model, name, module)
    if reason:
        raise ValueError(f"{name!r} cannot be adapted: {reason}.")
    selection.modules[name] = module


def _all_linear(model: nn.Module, selection: Selection) -> None:
    """Every linear layer but the model's head, as PEFT's "all-linear" does."""
    for name, module in model.named_modules():
        if not name or not (isinstance(module, nn.Linear) or is_transposed(module)) or _is_head(model, name, module):
            continue
        reason = refusal(model, name, module)
        if reason:
            selection.skipped[name] = reason
        else:
            selection.modules[name] = module
    if not selection.modules:
        why = "".join(f"\n  {name}: {reason}" for name, reason in list(selection.skipped.items())[:5])
        raise ValueError(f"targets='all-linear' finds no linear layer in {type(model).__name__} to adapt.{why}")


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear layer is the output of a transformers model: outside its base model, or the language head."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    prefix = getattr(model, "base_model_prefix", "")
    has_base = bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
    return module is output or (has_base and not name.startswith(prefix + "."))


def _without_duplicates(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module once, under its first name: layers may be shared (ALBERT)."""
    names: dict[int, str] = {}
    for name, module in modules.items():
        names.setdefault(id(module), name)
    return {name: modules[name] for name in names.values()}


def _is_glob(pattern: str) -> bool:
    return re.search(r"[*?\[]", pattern) is not None
