"""Adapting an existing model in place, by changing the class of its layers, and taking that back.

`attach` turns an `nn.Linear` into a `lorakit.Linear`: the same object, the same weight tensor, hooks, keys, device and
dtype, with `lora_A` and `lora_B` beside the weight. There is no wrapper model and no renamed key, so whatever worked
with the model before (Trainer, generate, FSDP2, torch.compile, state_dict) works with it after. `detach` gives back the
model that `attach` was given.

What was changed is noted on each module (`undo.py`), so all of this works on a part of a model, on copies, and after
pickling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .adapted import AdaptedLayer
from .adapter import TokenRows
from .dropout import QuickDropout
from .errors import LoraError
from .kinds import class_of, layer_class
from .layouts import Layout
from .lora_layer import LoRALayer
from .mergeable import Mergeable
from .names import named_modules, named_parameters, unwrapped
from .parameters import AdaptedParameter, adapt_parameter
from .record import Record
from .report import ModuleRow, Report
from .settings import Filter, LoRASettings
from .shares import shares_of
from .statistics import freeze_statistics, persistent_buffers, thaw_statistics
from .targets import Selection, Target, closest, matching, select
from .tied import held_refusal, held_tables, untie
from .token_rows import UsesRows, adopt_rows, chosen_rows, tied_modules, token_tables
from .trainable import Bias, bias_names
from .undo import change_class, note, own_tensor, remember, restore, unchanged_on_error, undo_of


def attach(
    model: nn.Module,
    targets: str | Iterable[str] | Filter | LoRASettings = "all-linear",
    *,
    freeze: bool = True,
    **settings: Any,
) -> Report:
    """Adapt `model` in place: y = W x + b becomes y = W x + b + (alpha/rank) · B A x in every target layer.

        attach(model)                                                every linear layer but the head, rank 16
        attach(model, ["q_proj", "v_proj"], rank=8, alpha=16)        the layers whose names end like this
        attach(model, "*.layers.[0-9].*", exclude="*.mlp.*")         a glob over whole names, some left out
        attach(model, "c_attn", rank_pattern={"c_attn": [8, 0, 8]})  q and v of a fused projection
        attach(model, LoRASettings(rank=4, dora=True))               settings as one object

    targets, settings: as in `LoRASettings`, which says what each means.
    freeze: freeze every parameter that the adapter does not train, and the running statistics of norms with it.

    Returns a Report; print it. Raises LoraError, before anything is changed, when a pattern matches nothing or a
    target cannot be adapted. Neither the mode (train/eval) nor any existing tensor is changed.
    """
    if isinstance(targets, LoRASettings):
        wanted = dataclasses.replace(targets, **settings)
    else:
        wanted = LoRASettings.named(targets, settings)
    model = unwrapped(model)
    selection = select(model, wanted.targets, wanted.exclude)
    shares = shares_of(wanted, selection)
    whole = _modules_trained_whole(model, wanted.also_train, selection)
    rows = chosen_rows(model, wanted.trainable_tokens)
    for name in rows:
        _refuse_other_ways(model, name, selection, whole)
    bias_names(model, wanted.bias)  # refuses an unknown word before anything changes

    with unchanged_on_error(model):
        for name, target in selection.targets.items():
            share = shares[name]
            layer = adopt(target, wanted.dropout, share.layout)
            layer.create_update(
                share.rank,
                share.alpha,
                rslora=wanted.rslora,
                dora=wanted.dora,
                init=wanted.init,
                dtype=wanted.dtype or factor_dtype(layer.like),
            )
        for name, tokens in rows.items():
            table = model.get_submodule(name).get_parameter("weight")
            values = TokenRows(tokens, table.detach()[list(tokens)])
            adopt_rows(model, name, values, wanted.dtype or factor_dtype(table))
        trained = choose_trainable(model, whole, wanted.bias, freeze=freeze)
        note_adapted(model)
        return _report(model, selection, trained)


def adopt(target: Target, dropout: float, layout: Layout | None = None) -> AdaptedLayer:
    """Change the class of a plain layer, or of the module that owns a parameter, to its adapted one.

    Returns the adapted layer, which has no update yet. layout: that of its update; None means the kind's own.
    """
    module = target.module
    if target.parameter:
        change_class(module, type(module))  # notes the class, which `adapt_parameter` changes
        return adapt_parameter(module, target.parameter)
    plain, kind = type(module), layer_class(module)
    assert kind is not None, "select() lets only adaptable modules through"
    layout = layout or kind.plain_layout
    cls = kind.class_for(layout)
    assert cls is not None, "the caller has asked"
    change_class(module, class_of(cls, plain))
    assert isinstance(module, AdaptedLayer)
    LoRALayer.__init__(module, 0, 0.0, dropout, merge_weights=False)
    # A computed weight is not stored, so it cannot be read as the sum.
    module.read_as_sum = "weight" in module._parameters
    module.read_whole = target.read_whole
    if dropout > 0:
        module.lora_dropout = QuickDropout(dropout).train(module.training)
    module.adopted(plain, layout)
    return module


def factor_dtype(weight: Tensor) -> torch.dtype:
    """The factors' dtype: the weight's, or float32 for half precision, which cannot hold an optimizer's small steps."""
    return torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype


def choose_trainable(model: nn.Module, whole: Iterable[str], bias: Bias, *, freeze: bool) -> tuple[str, ...]:
    """Set `requires_grad` for the adapter, the modules trained whole and the biases, and note what it was before.

    A module that is trained whole and tied to another one gets its own copy of the weight.

    Returns the names of the parameters trained beside the factors.
    """
    whole = tuple(whole)
    if any(undo.swapped for module in model.modules() if (undo := note(module))):
        raise LoraError("the model is inside lorakit.disabled, where it is the base model. Leave that first.")
    for name in whole:
        undo_of(model.get_submodule(name)).whole = True
        for module, local, tied in untie(model, name):
            undo_of(module).tied[local] = tied
    selected = bias_names(model, bias)
    for name in whole:
        prefix = f"{name}."
        selected |= {key for key, _ in named_parameters(model, remove_duplicate=False) if key.startswith(prefix)}
    selected = {name for name in selected if not name.rpartition(".")[2].startswith("lora_")}
    # By identity: a tied weight has two names, and training it under one of them trains it.
    parameters = dict(named_parameters(model, remove_duplicate=False))
    chosen = {id(parameters[name]) for name in selected}
    for prefix, module in named_modules(model):
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local.startswith("lora_"):
                continue
            train = id(parameter) in chosen
            if train or (freeze and parameter.requires_grad):
                undo = undo_of(module)
                undo.requires_grad.setdefault(local, parameter.requires_grad)
                parameter.requires_grad = train
                if name in selected:
                    undo.trained.setdefault(local, parameter.detach().clone())
        if any(f"{prefix}.".startswith(f"{name}.") for name in whole):
            thaw_statistics(module)
            for local, buffer in persistent_buffers(module).items():
                undo_of(module).trained.setdefault(local, buffer.detach().clone())
        elif freeze:
            freeze_statistics(module)
    return tuple(sorted(selected))


def keep_values(model: nn.Module, names: Iterable[str]) -> None:
    """Note the values of these tensors before an adapter sets them. They belong to the adapter, trained or not."""
    # A tied tensor is noted once, because its values must be exchanged once.
    noted = {id(tensor) for tensor in trained_whole(model)[0].values()}
    for name in names:
        owner, _, local = name.rpartition(".")
        module = unwrapped(model.get_submodule(owner))
        tensor = own_tensor(module, local)
        if id(tensor) not in noted:
            undo_of(module).trained[local] = tensor.detach().clone()
            noted.add(id(tensor))


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers and parameters with an update, by name. A shared one is listed once."""
    return {
        module.public_name(name) if isinstance(module, AdaptedParameter) else name: module
        for name, module in named_modules(model)
        if isinstance(module, AdaptedLayer) and module.has_update
    }


def mergeable_layers(model: nn.Module) -> dict[str, Mergeable]:
    """All that `merge` folds into the weights, by name: the adapted layers, and the tables with trained rows."""
    return {**adapted_layers(model), **token_tables(model)}


def note_adapted(model: nn.Module) -> None:
    """Keep on the model what is adapted now, and the base's statistics, to tell later what is gone or has moved."""
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.forget()
    using = {name: module for name, module in named_modules(model) if isinstance(module, UsesRows)}
    remember(model, {**layers, **using})
    Record.note(model)


def trained_whole(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors that belong to the adapter beside the factors, and the modules named in `also_train`.

    The tensors have their trained values, also inside `disabled`.
    """
    tensors: dict[str, Tensor] = {}
    modules = []
    for prefix, module in named_modules(model):
        undo = note(module)
        if undo is None:
            continue
        tensors |= {f"{prefix}.{local}" if prefix else local: value for local, value in undo.values(module).items()}
        if undo.whole:
            modules.append(prefix)
    return tensors, tuple(modules)


def detach(model: nn.Module) -> None:
    """Give back the model that `attach` was given: classes, parameters, requires_grad, values trained whole.

    A merged model stays merged: `merge(model); detach(model)` leaves a plain model with W + ΔW and no second copy.
    """
    stays_merged = any(layer.merged for layer in mergeable_layers(model).values())
    using = [module for module in model.modules() if isinstance(module, UsesRows)]
    # Tied modules elsewhere would be left with rows that are gone, where `model` is a part of a model.
    tied = [holder for module in using for holder in module.rows.holders]
    for module in (*model.modules(), *tied):
        restore(module, keep_trained=stays_merged)
    Record.drop(model)


def _modules_trained_whole(model: nn.Module, also_train: Iterable[str], selection: Selection) -> list[str]:
    patterns = [also_train] if isinstance(also_train, str) else list(also_train)
    names = list(dict.fromkeys(name for name, _ in named_modules(model) if name))
    held = held_tables(model)
    chosen: list[str] = []
    for pattern in patterns:
        hits = matching(pattern, names)
        if not hits:
            raise LoraError(f"also_train={pattern!r} matches no module. {closest(pattern, names)}".rstrip())
        for name in hits:
            if name in held:
                raise LoraError(f"also_train={pattern!r} cannot be trained: {held_refusal(held[name])}.")
            stored = {p.dtype for p in model.get_submodule(name).parameters() if not p.is_floating_point()}
            if stored:
                raise LoraError(
                    f"also_train={pattern!r} cannot be trained: {name!r} has weights stored as {stored.pop()}, which "
                    "take no gradient. Adapt it instead."
                )
            inside = [target for target in selection.targets if f"{target}.".startswith(f"{name}.")]
            if inside:
                raise LoraError(
                    f"also_train={pattern!r} trains {name!r} whole, but targets adapts {inside[0]!r} in it. Choose one."
                )
        chosen += hits
    return chosen


def _refuse_other_ways(model: nn.Module, table: str, selection: Selection, whole: Iterable[str]) -> None:
    """Raise LoraError if a module with this table's weight is also to be adapted by A and B, or trained whole."""
    for name in tied_modules(model, table):
        if name in selection.targets:
            raise LoraError(f"trainable_tokens trains rows of {name!r}, and targets adapts it. Choose one of them.")
        if outer := [module for module in whole if f"{name}.".startswith(f"{module}.")]:
            raise LoraError(
                f"trainable_tokens trains rows of {name!r}, and also_train all of {outer[0]!r}. Choose one."
            )


def _report(model: nn.Module, selection: Selection, trained: tuple[str, ...]) -> Report:
    layers = adapted_layers(model)
    rows = []
    for name in selection.targets:
        layer = layers[name]
        outputs, inputs = layer.size()
        count = sum(p.numel() for local, p in layer.named_parameters(recurse=False) if local.startswith("lora_"))
        rows.append(ModuleRow(name, type(layer).__name__, (inputs, outputs), layer.r, count))
    sized = [p for p in model.parameters() if not is_lazy(p)]
    trainable = sum(p.numel() for p in sized if p.requires_grad)
    total = sum(p.numel() for p in sized)
    tables = {name: (*table.lora_rows.shape, len(table.own_weight)) for name, table in token_tables(model).items()}
    return Report(tuple(rows), trained, selection.skipped, trainable, total, tables)
