"""Between a model and an `Adapter`: `extract` reads what was learnt out of the layers, `insert` puts it into a model.

`insert` checks everything before it changes anything. An update without a module, a shape that differs, a layer
without an update: each is an error, and all are listed at once, because an adapter that loads "successfully" and does
nothing is the worst outcome (problem 3).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer
from .adapter import Adapter, TokenRows, Update
from .attach import adapted_layers, adopt, choose_trainable, factor_dtype, keep_values, note_adapted, trained_whole
from .errors import LoraError
from .layouts import Layout, Lookup, Stack
from .lora_layer import copied
from .names import named_modules, unwrapped
from .parameters import parameter_layout
from .report import numberless
from .sharded import sharded_refusal
from .targets import Target, candidates, closest, matching, refusal
from .task import task_type
from .token_rows import (
    TrainedRows,
    adopt_rows,
    checked_tokens,
    first_name,
    rows_refusal_of,
    tied_modules,
    token_tables,
)
from .trainable import bias_names, tensors_by_name
from .undo import refuse_replaced, unchanged_on_error


def extract(model: nn.Module, *, force: bool = False) -> Adapter:
    """What the adapter of `model` holds, as plain data: copies, on the CPU, in the dtype they are trained in.

    It is the same whether the model is merged or not. Raises LoraError if the model has no adapter, or if another
    module took the place of an adapted one. With force, such modules are left out.
    """
    model = unwrapped(model)
    if not force:
        refuse_replaced(model)
    layers = adapted_layers(model)
    parameters, whole = trained_whole(model)
    tables = token_tables(model)
    if not layers and not parameters and not tables:
        raise LoraError(f"{type(model).__name__} has no adapter to extract: call lorakit.attach first.")
    own = {name for name in parameters if any(name.startswith(f"{module}.") for module in whole)}
    frozen_bias = bias_names(model, "all") & parameters.keys() - own
    adapted_bias = bias_names(model, "lora_only")
    config = getattr(model, "config", None)
    return Adapter(
        updates={name: layers[name].to_update() for name in _in_the_models_order(model, layers)},
        trained={name: copied(tensor) for name, tensor in parameters.items()},
        also_train=whole,
        bias="none" if not frozen_bias else "lora_only" if frozen_bias <= adapted_bias else "all",
        dropout=max((_dropout_of(layer) for layer in layers.values()), default=0.0),
        targets=_shortest_targets(model, list(layers)),
        base_model=getattr(config, "_name_or_path", None) or None,
        task_type=task_type(model, parameters, layers),
        token_rows={name: table.to_rows() for name, table in tables.items()},
    )


@torch.no_grad()
def insert(model: nn.Module, adapter: Adapter, *, dtype: torch.dtype | None = None, force: bool = False) -> None:
    """Put `adapter` into `model`: plain layers are adapted, layers with an update of the same shapes are filled.

    Like `attach`, it freezes everything else and changes neither mode nor base weights. dtype: that of the factors; by
    default existing factors keep theirs, and new ones get the dtype that `attach` chooses. With force, what does not
    fit is left out instead of refused. Raises LoraError listing every misfit, before anything is changed.
    """
    model = unwrapped(model)
    layers, targets, tables = adapted_layers(model), candidates(model), token_tables(model)
    for name, layer in {**layers, **tables}.items():
        if reason := sharded_refusal(layer):
            raise LoraError(f"{name!r} cannot take an adapter: {reason}.")
    problems = _misfits(model, adapter, layers, targets) | _rows_misfits(model, adapter, tables)
    if problems and not force:
        made_for = f", it was made for {adapter.base_model}" if adapter.base_model else ""
        listed = "\n".join(_listed(problems.values()))
        raise LoraError(f"the adapter does not fit {type(model).__name__}{made_for}:\n{listed}")
    if {*adapter.updates, *adapter.trained, *adapter.token_rows} <= set(problems):
        raise LoraError(f"nothing in the adapter fits {type(model).__name__}: its modules have other names or shapes.")

    trained = {name: value for name, value in adapter.trained.items() if name not in problems}
    whole = [name for name in adapter.also_train if any(key.startswith(f"{name}.") for key in trained)]
    before = tensors_by_name(model)
    with unchanged_on_error(model, [before[name] for name in trained]):
        for name, update in adapter.updates.items():
            if name not in problems:
                _insert_update(layers.get(name), targets[name], update, adapter.dropout, dtype)
        for name, rows in adapter.token_rows.items():
            if name not in problems and first_name(model, name) == name:
                _insert_rows(model, tables.get(name), name, rows, dtype)
        choose_trainable(model, whole, adapter.bias, freeze=True)
        keep_values(model, trained)
        own = tensors_by_name(model)  # a tied module that is trained whole has its own copy now
        note_adapted(model)
        for name, value in trained.items():
            own[name].copy_(value)


def _listed(problems: Iterable[str]) -> list[str]:
    """A line for each problem. Numbered layers with the same problem share a line."""
    alike: dict[str, list[str]] = {}
    for problem in problems:
        alike.setdefault(numberless(problem), []).append(problem)
    lines = [f"  {own[0]}" if len(own) == 1 else f"  {line} (×{len(own)})" for line, own in alike.items()]
    return lines[:20] + ([f"  … and {len(lines) - 20} more"] if len(lines) > 20 else [])


def _in_the_models_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names in the order of the model, and not in the order in which they were adapted."""
    order = {name: place for place, name in enumerate(candidates(model))}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def _insert_update(
    layer: AdaptedLayer | None, target: Target, update: Update, dropout: float, dtype: torch.dtype | None
) -> None:
    if layer is not None:
        layer.take_update(update, dtype or layer.lora_A.dtype)
    else:
        layer = adopt(target, dropout, update.layout)
        layer.take_update(update, dtype or factor_dtype(layer.like))


def _insert_rows(
    model: nn.Module, table: TrainedRows | None, name: str, rows: TokenRows, dtype: torch.dtype | None
) -> None:
    if table is not None:
        table.take_rows(rows, dtype or table.lora_rows.dtype)
    else:
        adopt_rows(model, name, rows, dtype or factor_dtype(model.get_submodule(name).get_parameter("weight")))


def _misfits(
    model: nn.Module, adapter: Adapter, layers: dict[str, AdaptedLayer], targets: dict[str, Target]
) -> dict[str, str]:
    """Why each update or tensor has no place in `model`, by name."""
    parameters = tensors_by_name(model)
    problems: dict[str, str] = {}
    for name, update in adapter.updates.items():
        reason = _misfit(layers.get(name), targets.get(name), update)
        if reason:
            rows = update.A.shape[1] if isinstance(update.layout, Lookup) else update.B.shape[0]
            problems[name] = f"{name}: {reason}{_other_vocabulary(model, name, rows)}"
    if len(problems) == len(adapter.updates) and adapter.updates:
        hint = closest(next(iter(adapter.updates)), [name for name, target in targets.items() if not refusal(target)])
        first = next(iter(problems))
        problems[first] = f"{problems[first]}. {hint}".rstrip(". ")
    for name, value in adapter.trained.items():
        if name not in parameters:
            problems[name] = f"{name}: the model has no such parameter"
        elif parameters[name].shape != value.shape:
            resized = _other_vocabulary(model, name.rpartition(".")[0], len(value)) if value.dim() else ""
            shapes = f"shape {tuple(value.shape)}, the model has {tuple(parameters[name].shape)}"
            problems[name] = f"{name}: {shapes}{resized}"
    fitting = {name: value for name, value in adapter.trained.items() if name not in problems}
    problems |= _torn(model, fitting, adapter.also_train)
    for name in layers:
        if name not in adapter.updates:
            problems[name] = f"{name}: adapted in the model, missing in the adapter"
    return problems


def _rows_misfits(model: nn.Module, adapter: Adapter, tables: Mapping[str, TrainedRows]) -> dict[str, str]:
    """Why the trained rows of each table have no place in `model`, by name."""
    problems = {}
    for name, rows in adapter.token_rows.items():
        try:
            reason = _rows_misfit(model, name, rows, adapter, tables.get(name))
        except LoraError as error:
            reason = str(error)
        if reason:
            problems[name] = f"{name}: {reason}"
    missing = {name: f"{name}: rows of it are trained in the model, and none in the adapter" for name in tables}
    return problems | {name: why for name, why in missing.items() if name not in adapter.token_rows}


def _rows_misfit(
    model: nn.Module, name: str, rows: TokenRows, adapter: Adapter, table: TrainedRows | None
) -> str | None:
    if name not in dict(named_modules(model)):
        return "the model has no such module"
    if (first := first_name(model, name)) != name and rows.equals(adapter.token_rows.get(first)):
        return None  # PEFT may write those of a tied head too
    module = model.get_submodule(name)
    if table is None and (reason := rows_refusal_of(module)):
        return f"its rows cannot be trained: {reason}"
    weight = module.get_parameter("weight")
    if rows.values.shape != (len(rows.tokens), weight.shape[1]):
        found = tuple(rows.values.shape)
        return f"{len(rows.tokens)} rows are stored as {found}, and the model's table is {tuple(weight.shape)}"
    if table is not None:
        given, own = set(rows.tokens), set(table.tokens)
        other = sorted(given ^ own)[:3]
        return (
            f"the adapter and the model train other rows: {', '.join(map(str, other))} in one of them"
            if other
            else None
        )
    checked_tokens(name, rows.tokens, len(weight))
    if first != name:
        return f"its own rows are in the adapter, and in the model it is tied to {first}. Untie them first"
    for tied in tied_modules(model, name):
        if tied in adapter.updates or any(f"{tied}.".startswith(f"{whole}.") for whole in adapter.also_train):
            return f"the adapter trains rows of it, and all of {tied}, which has the same weight in the model"
    return None


def _other_vocabulary(model: nn.Module, name: str, rows: int) -> str:
    """What to do about a table of tokens that has another number of rows in the model; empty for other modules."""
    module = dict(named_modules(model, remove_duplicate=False)).get(name)
    get_output = getattr(model, "get_output_embeddings", None)
    is_table = isinstance(module, nn.Embedding) or (callable(get_output) and module is get_output())
    weight = None if module is None else module._parameters.get("weight")
    if not is_table or weight is None or len(weight) == rows:
        return ""
    return (
        f". The adapter was made for a table of {rows} rows, and the model's has {len(weight)}: call "
        f"model.resize_token_embeddings({rows}) before loading"
    )


def _torn(model: nn.Module, trained: Mapping[str, Tensor], whole: Sequence[str]) -> dict[str, str]:
    """The misfits of tied parameters: a value for one of several tied modules would change the others too.

    whole: the modules that are trained whole. Each of them gets its own copy of a tied weight.
    """
    own = tuple(f"{module}." for module in whole)
    tied: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for prefix, module in named_modules(model):
        for local, parameter in module._parameters.items():
            name = f"{prefix}.{local}" if prefix else local
            if parameter is not None and not name.startswith(own):
                parameters[id(parameter)] = parameter
                tied.setdefault(id(parameter), []).append(name)
    problems: dict[str, str] = {}
    for key, names in tied.items():
        given = [name for name in names if name in trained]
        present = parameters[key]
        values = [trained.get(name, present) for name in names]
        if (
            not given
            or len(names) == 1
            or all(torch.equal(value.to(present), values[0].to(present)) for value in values)
        ):
            continue
        owner, _, local = given[-1].rpartition(".")
        others = ", ".join(name for name in names if name != given[-1])
        problems[given[-1]] = (
            f"{given[-1]}: has a value of its own in the adapter, and in the model it is tied to {others}. Untie it "
            f"first: module = model.get_submodule({owner!r}); module.{local} = torch.nn.Parameter("
            f"module.{local}.detach().clone()); model.config.tie_word_embeddings = False"
        )
    return problems


def _misfit(layer: AdaptedLayer | None, target: Target | None, update: Update) -> str | None:
    if layer is not None:
        present = layer.to_update()
        if not present.layout.holds(update.layout):
            return _of_another_layout(update, present.layout, f"a {present.kind} one")
        expected = {key: tuple(tensor.shape) for key, tensor in present.tensors().items()}
        found = {key: tuple(tensor.shape) for key, tensor in update.tensors().items()}
        return None if expected == found else f"shapes {found}, the model has {expected}"
    if target is None:
        return "the model has no such module"
    reason = refusal(target)
    if reason:
        return reason
    if target.class_for(update.layout) is None:
        own = parameter_layout(target.module, target.weight) if target.parameter else None
        return _of_another_layout(update, own, target.parameter or type(target.module).__name__)
    shapes = tuple(update.A.shape), tuple(update.B.shape)
    wanted = target.shapes(update.rank, update.layout)
    if shapes != wanted:
        return f"A and B are {shapes[0]} and {shapes[1]}, the layer needs {wanted[0]} and {wanted[1]}"
    return None


def _of_another_layout(update: Update, own: Layout | None, has: str) -> str:
    if isinstance(own, Stack) and isinstance(update.layout, Stack):
        return "without the model its file does not tell W from Wᵀ: read it with lorakit.load(model, path)"
    return f"holds a {update.kind} update, the model has {has}"


def _shortest_targets(model: nn.Module, adapted: list[str]) -> tuple[str, ...]:
    """Name endings that select the adapted modules and no other module, as other readers expect them ("q_proj").

    If a name is the end of another name, a glob selects it alone: "[0]" matches 0 and not 1.0.
    """
    wanted = set(adapted)
    others = [name for name in candidates(model) if name not in wanted]
    selective: dict[str, bool] = {}
    chosen: set[str] = set()
    for name in adapted:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            ending = ".".join(parts[-depth:])
            if ending not in selective:
                selective[ending] = not matching(ending, others)
            if selective[ending]:
                chosen.add(ending)
                break
        else:
            chosen.add(f"[{name[0]}]{name[1:]}")
    return tuple(sorted(chosen))


def _dropout_of(layer: AdaptedLayer) -> float:
    return layer.lora_dropout.p if isinstance(layer.lora_dropout, nn.Dropout) else 0.0
