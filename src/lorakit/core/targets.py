"""Choosing modules by name, and refusing those on which an adapter would silently do nothing.

A target is a glob over whole dotted names ("*.q_proj", "model.layers.[0-3].*"), the end of a name as PEFT takes it
("q_proj", "attn.q_proj"), or a word: "all-linear", or "all-linear+experts", which takes the matrices of a mixture's
experts too. Every one of them must match something: a misspelt name among good ones is the commonest way to train less
than was meant (problem 4).

Dispatch is on the exact type. A subclass of `nn.Linear` or of a convolution may compute its output differently, so the
update is added beside that output (`beside.py`), after a trial. A subclass that stores its weight in integers, or is
not linear, is refused with the reason. If a weight is read and no layer is called with it, the parameter itself is the
target: attention's `in_proj_weight`, the layers whose weights torch's attention and encoder layer read, and any other
matrix or stack of matrices, only if it is named ("experts.gate_up_proj").
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .adapted import AdaptedLayer
from .errors import LoraError
from .hooked import forward_refusal
from .kinds import layer_class
from .layers import Linear
from .layouts import Layout
from .lora_layer import weight_refusal
from .mergeable import StoredWeight
from .names import named_modules
from .parameters import AdaptedParameter, adapted_parameters, parameter_factor_shapes, parameter_layout
from .settings import Filter
from .sharded import sharded_refusal
from .tables import tables_read_whole
from .tied import held_refusal, held_tables
from .words import did_you_mean, nearest

ALL_LINEAR, WITH_EXPERTS = "all-linear", "all-linear+experts"
Value = TypeVar("Value")

_ADAPTABLE = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
# They hand the weights of their linear children to a function, in their fast paths or always.
_READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


@dataclass(frozen=True)
class Target:
    """What can be adapted under one name: a layer, or a parameter of a module."""

    module: nn.Module
    parameter: str = ""  # empty: the module is a layer
    read_whole: bool = False  # an embedding whose whole table is read
    held_for: tuple[str, ...] = ()  # embeddings that are called instead of this one, which only holds their table

    @property
    def weight(self) -> Any:
        return self.module._parameters.get(self.parameter or "weight")

    def class_for(self, layout: Layout) -> type[AdaptedLayer] | None:
        """The adapted class that holds an update of this layout, or None."""
        if self.parameter:
            return AdaptedParameter if parameter_layout(self.module, self.weight).holds(layout) else None
        kind = layer_class(self.module)
        return None if kind is None else kind.class_for(layout)

    def shapes(self, rank: int, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B of an update of this layout."""
        if self.parameter:
            return parameter_factor_shapes(self.module, self.weight, rank)
        kind = layer_class(self.module)
        assert kind is not None, "class_for said so"
        return kind.shapes_on(self.module, rank, layout)


@dataclass
class Selection:
    """What to adapt, by name, and what was passed over, with the reason."""

    targets: dict[str, Target] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


def candidates(model: nn.Module) -> dict[str, Target]:
    """Every name that a target can match: those of modules, and those of matrices that belong to no layer."""
    found: dict[str, Target] = {}
    held = held_tables(model)
    read: set[int] = set()  # layers whose weight is read by their parent
    inside: tuple[str, ...] = ()  # prefixes of parametrisations, which hold what weights are computed from
    tables: set[int] = set()  # embeddings whose rows are all read
    for name, module in named_modules(model, remove_duplicate=False):
        if isinstance(module, ParametrizationList):
            inside = (*inside, f"{name}.")
        if f"{name}.".startswith(inside):
            continue
        if isinstance(module, _READING_PARENTS):
            read |= {id(child) for child in module.children() if isinstance(child, nn.Linear)}
        tables |= set(map(id, tables_read_whole(module)))
        if name:
            parameter = "weight" if id(module) in read else ""
            found[name] = Target(module, parameter, id(module) in tables, held.get(name, ()))
        prefix = f"{name}." if name else ""
        found |= {prefix + parameter: Target(module, parameter) for parameter in matrices(module)}
    return found


def matrices(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's own parameters that can be adapted as they are: matrices, and stacks of them."""
    if isinstance(module, (AdaptedLayer, *_ADAPTABLE)) or layer_class(module):
        return ()
    return tuple(
        name
        for name, value in module._parameters.items()
        if value is not None
        and not is_lazy(value)
        and value.dim() in (2, 3)
        and min(value.shape) > 1
        and not name.startswith("lora_")
    )


def select(model: nn.Module, targets: str | Iterable[str] | Filter, exclude: str | Iterable[str] = ()) -> Selection:
    """What `targets` names in `model`, without what `exclude` names.

    Raises LoraError when a target or an exclusion matches nothing, when a target matches something that cannot be
    adapted, and when nothing is left.
    """
    _refuse_peft(model)
    named = candidates(model)
    wanted = targets if callable(targets) else [targets] if isinstance(targets, str) else list(targets)
    if left_out := _left_out(model, named, [exclude] if isinstance(exclude, str) else list(exclude)):
        kept = {name: own for name, own in named.items() if name not in left_out}
        for pattern in () if callable(wanted) else wanted:
            if matching(pattern, named) and not matching(pattern, kept):
                raise LoraError(f"exclude={exclude!r} leaves nothing of the target {pattern!r}.")
        named = kept
    return _selected(model, named, wanted)


def _left_out(model: nn.Module, named: Mapping[str, Target], patterns: Sequence[str]) -> set[str]:
    """The names that the patterns exclude, and all that is inside these modules."""
    found: set[str] = set()
    for pattern in patterns:
        hits = matching(pattern, named)
        within = tuple(f"{hit}." for hit in hits)
        inside = [name for name in named if name.startswith(within)]
        if not hits:
            raise LoraError(
                f"exclude={pattern!r} matches no module of {type(model).__name__}. {closest(pattern, named)}".rstrip()
            )
        found |= {*hits, *inside}
    return found


def _selected(model: nn.Module, named: dict[str, Target], targets: list[str] | Filter) -> Selection:
    if callable(targets):
        return _by_filter(model, named, targets)
    if not targets:
        raise LoraError("targets is empty: name at least one module, or use 'all-linear'.")
    selection = Selection()
    for pattern in targets:
        if pattern in (ALL_LINEAR, WITH_EXPERTS):
            _all_linear(model, named, selection, experts=pattern == WITH_EXPERTS)
        else:
            _by_pattern(model, named, pattern, targets, selection)
    selection.targets = _without_duplicates(selection.targets)
    taken = {*selection.targets, *(name.rpartition(".")[0] for name, own in selection.targets.items() if own.parameter)}
    selection.skipped = {name: reason for name, reason in selection.skipped.items() if name not in taken}
    return selection


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a glob over whole names, or the end of a name, selects."""
    if is_glob(pattern):
        return [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    return [name for name in names if name == pattern or name.endswith("." + pattern)]


def closest(pattern: str, names: Iterable[str]) -> str:
    """A sentence with the real names nearest to a misspelt one; empty when nothing is near."""
    by_suffix: dict[str, list[str]] = {}
    wanted = pattern.replace("*", "").strip(".")
    depth = wanted.count(".") + 1
    for name in names:
        by_suffix.setdefault(".".join(name.split(".")[-depth:]), []).append(name)
    near = nearest(wanted, by_suffix, cutoff=0.5)
    if not near or wanted in by_suffix:  # the spelling is right, so something else is wrong
        return ""
    first, *more = by_suffix[near]
    others = f" and {len(more)} like it" if more else ""
    return f"Closest: {first!r}{others}.{did_you_mean(pattern.replace(wanted, near) if wanted else near)}"


def pattern_values(patterns: Mapping[str, Value], names: Sequence[str], what: str) -> dict[str, Value]:
    """The value for each name that some pattern of `what` (rank_pattern, say) selects; the first one wins."""
    values: dict[str, Value] = {}
    for pattern, value in patterns.items():
        hits = matching(pattern, names)
        if not hits:
            raise LoraError(
                f"{what}={pattern!r} matches none of the adapted modules. {closest(pattern, names)}".rstrip()
            )
        for name in hits:
            values.setdefault(name, value)
    return values


def refusal(target: Target) -> str | None:
    """Why `target` cannot be adapted, or None when it can."""
    if target.held_for:
        return held_refusal(target.held_for)
    module, kind = target.module, type(target.module).__name__
    if isinstance(module, AdaptedLayer) and not module.has_update:
        return f"it is a {kind} made with r=0"
    if isinstance(module, StoredWeight) or target.parameter in adapted_parameters(module):
        return "it is adapted already; call lorakit.detach(model) first"
    if isinstance(module, nn.RNNBase):
        return f"{kind} hands over its weights from a list of its own, so an adapter would do nothing"
    if reason := sharded_refusal(module):
        return reason
    return weight_refusal(target.weight) if target.parameter else _layer_refusal(module)


def _layer_refusal(module: nn.Module) -> str | None:
    kind = type(module).__name__
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return f"{kind} is not supported: its weight is laid out (in, out/groups, *k)"
    if isinstance(module, LazyModuleMixin):
        return f"{kind} has no weight before its first forward pass: run the model once, then attach"
    cls = layer_class(module)
    if cls is None:
        if isinstance(module, _ADAPTABLE):
            return f"{type(module).__module__}.{kind} is a subclass that may read its weight in a way of its own"
        inside = [child for child, inner in module.named_modules() if child and layer_class(inner)]
        inside += matrices(module)
        hint = f"; inside it: {', '.join(inside[:6])}" if inside else ""
        return f"{kind} is no linear, embedding or convolution layer{hint}"
    return forward_refusal(module) or cls.refusal_of(module)


def _by_filter(model: nn.Module, named: dict[str, Target], wanted: Filter) -> Selection:
    selection = Selection()
    for name, module in named_modules(model):
        if name in named and wanted(module, name):
            _take(named, name, selection)
    if not selection.targets:
        raise LoraError(f"targets={wanted!r} selects no module of {type(model).__name__}.")
    return selection


def _by_pattern(
    model: nn.Module, named: dict[str, Target], pattern: str, patterns: list[str], selection: Selection
) -> None:
    hits = matching(pattern, named)
    if is_glob(pattern):
        # A glob such as "*.attn*" may also match containers, norms and position tables, which are ignored. But it must
        # not pass over a layer.
        hits = [name for name in hits if _is_layer(named[name])]
    if not hits:
        adaptable = [name for name, target in named.items() if _is_layer(target)]
        message = (
            f"targets={patterns} match no module of {type(model).__name__}"
            if len(patterns) == 1
            else (f"target {pattern!r} matches no module of {type(model).__name__}")
        )
        raise LoraError(f"{message}.\n{closest(pattern, adaptable)}".rstrip())
    held = {name: held_refusal(named[name].held_for) for name in hits if named[name].held_for}
    if len(held) < len(hits):
        selection.skipped |= held
        hits = [name for name in hits if name not in held]
    for name in hits:
        _take(named, name, selection)


def _take(named: dict[str, Target], name: str, selection: Selection) -> None:
    target = named[name]
    if inside := _inside(target):
        for inner in (f"{name}.{own}" for own in inside):
            if inner in named:  # if not, it is excluded
                _take(named, inner, selection)
        return
    reason = refusal(target)
    if reason:
        raise LoraError(f"{name!r} cannot be adapted: {reason}.")
    selection.targets[name] = target


def _inside(target: Target) -> list[str]:
    """What is adapted in the place of a module: the projections of an attention, the stacks of a mixture's experts."""
    module = target.module
    if target.parameter:
        return []
    if isinstance(module, nn.MultiheadAttention):
        return [*matrices(module), "out_proj"]
    return [own for own in matrices(module) if _is_of_experts(Target(module, own))]


def _all_linear(model: nn.Module, named: dict[str, Target], selection: Selection, *, experts: bool) -> None:
    """Every linear layer but the model's head, as PEFT's "all-linear" does, and attention's projections.

    experts: and the stacked matrices of experts. Raises LoraError where there are none.
    """
    of_experts = {name for name, target in named.items() if _is_of_experts(target)}
    if experts and not of_experts:
        raise LoraError(
            f"targets={WITH_EXPERTS!r}: {type(model).__name__} keeps no stack of experts' matrices. Use "
            f"{ALL_LINEAR!r}, which takes experts that are linear layers, or name what is to be adapted."
        )
    for name, target in named.items():
        module = target.module
        if name in of_experts and not experts:
            owner, _, _ = name.rpartition(".")
            selection.skipped[owner] = (
                f"{type(module).__name__} has a matrix for each expert; {WITH_EXPERTS!r} takes them"
            )
        elif _is_stack(target) and name not in of_experts:
            selection.skipped[name] = f"{type(module).__name__} is no linear layer; name it to adapt them"
        if isinstance(module, nn.RNNBase) and not target.parameter:
            selection.skipped[name] = refusal(target) or ""
        if isinstance(module, nn.RNNCellBase) and target.parameter:
            selection.skipped[name] = f"{type(module).__name__} is no linear layer; name it to adapt it"
        linear = isinstance(module, nn.Linear | nn.MultiheadAttention) or issubclass(
            layer_class(module) or nn.Module, Linear
        )
        wanted = linear or (experts and name in of_experts)
        if not wanted or (isinstance(module, nn.MultiheadAttention) and not target.parameter):
            continue
        if _is_head(model, name, module):
            continue
        reason = refusal(target)
        if reason:
            selection.skipped[name] = reason
        else:
            selection.targets[name] = target
    if not selection.targets:
        why = "".join(f"\n  {name}: {reason}" for name, reason in list(selection.skipped.items())[:5])
        raise LoraError(f"targets={ALL_LINEAR!r} finds no linear layer in {type(model).__name__} to adapt.{why}")


def _is_layer(target: Target) -> bool:
    """Whether this is a layer of a kind that can be adapted, its weight, or a weight of attention; not any matrix."""
    kinds = (*_ADAPTABLE, nn.MultiheadAttention)
    return layer_class(target.module) is not None or isinstance(target.module, kinds)


def _is_torchs(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _refuse_peft(model: nn.Module) -> None:
    """Raise LoraError for a model with PEFT's adapters: its factors are linear layers too, its wrappers hide layers."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            raise LoraError(
                f"{type(model).__name__} has PEFT's adapters already ({name!r} is its {type(module).__name__}). Call "
                "its merge_and_unload() or unload() first, and attach to the model that it returns."
            )


def _is_stack(target: Target) -> bool:
    return bool(target.parameter) and target.weight is not None and target.weight.dim() == 3


def _is_of_experts(target: Target) -> bool:
    """Whether it is a stack with a matrix for each expert: its module counts them, or is called so."""
    module = target.module
    if not _is_stack(target) or _is_torchs(module):
        return False
    return getattr(module, "num_experts", None) == len(target.weight) or "expert" in type(module).__name__.lower()


def _is_head(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a linear layer is the output of a transformers model: outside its base model, or the language head."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    prefix = getattr(model, "base_model_prefix", "")
    has_base = bool(prefix) and isinstance(getattr(model, prefix, None), nn.Module)
    return module is output or (has_base and not name.startswith(prefix + "."))


def _without_duplicates(targets: dict[str, Target]) -> dict[str, Target]:
    """Each target once, under its first name, because layers may be shared (ALBERT)."""
    names: dict[tuple[int, str], str] = {}
    for name, target in targets.items():
        names.setdefault((id(target.module), target.parameter), name)
    return {name: targets[name] for name in names.values()}


def is_glob(pattern: str) -> bool:
    """Whether a target is a glob over whole names rather than the end of a name."""
    return re.search(r"[*?\[]", pattern) is not None
