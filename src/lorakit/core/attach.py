"""Adapting an existing model in place, by changing the class of its layers, and taking that back.

`attach` turns an `nn.Linear` into a `lorakit.Linear`: the same object, the same weight tensor, hooks, keys, device and
dtype, with `lora_A` and `lora_B` beside the weight. There is no wrapper model and no renamed key, so whatever took the
model before (Trainer, generate, FSDP, torch.compile, state_dict) takes it after. `detach` gives back the model that
`attach` was given.

What was changed is noted on each module (`undo.py`), so all of this works on a part of a model, on copies, and after
pickling.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .adapted import AdaptedLayer, LoRALayer
from .beside import Beside
from .dropout import QuickDropout
from .init import INITS, RANDOM_INITS, Init
from .layers import Embedding, Linear, MergedLinear, blocks_of
from .matrix import Blocks
from .names import named_modules, named_parameters, unwrapped
from .parameters import AdaptedParameter, adapt_parameter
from .record import Record
from .report import Report, Row
from .statistics import freeze_statistics, persistent_buffers, thaw_statistics
from .targets import Filter, Selection, Target, closest, is_transposed, layer_class, matching, pattern_values, select
from .tied import held_refusal, held_tables, untie
from .trainable import Bias, bias_names
from .undo import change_class, note, own_tensor, refuse_replaced, remember, restore, unchanged_on_error, undo_of
from .unused import refuse_silent

# Threads that enter and leave `disabled` take turns: a model is switched once, by the first of them and by the last.
_switching = threading.RLock()


def attach(
    model: nn.Module,
    targets: str | Iterable[str] | Filter = "all-linear",
    *,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: Init = "kaiming",
    rank_pattern: Mapping[str, int | Sequence[int]] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    splits: Mapping[str, Sequence[int]] | None = None,
    bias: Bias = "none",
    also_train: Iterable[str] = (),
    dtype: torch.dtype | None = None,
    freeze: bool = True,
) -> Report:
    """Adapt `model` in place: y = W x + b becomes y = W x + b + (alpha/rank) · B A x in every target layer.

    targets: "all-linear" (every linear layer but the head), a name's end ("q_proj"), a glob over whole names
        ("*.q_proj"), a list of these, or a function (module, name) → bool. The name of a parameter that no layer
        calls adapts it too ("experts.gate_up_proj"); that of an nn.MultiheadAttention, all its projections.
    rank, alpha: r and α; alpha=None means 2·rank. rank_pattern, alpha_pattern: other values for matching modules;
        a module with a rank of its own and no alpha of its own takes 2·rank when alpha is None.
        A sequence of ranks adapts the blocks of a fused output, 0 leaving one out: {"c_attn": [8, 0, 8]} is q and v of
        GPT-2, as in the paper. The blocks are equal unless `splits` gives their sizes: {"qkv_proj": [512, 128, 128]}.
    dropout: probability, on the update's input; of an embedding, whose input is a token, of whole tokens.
    rslora: scale α/√r. dora: learn the rows' magnitudes too.
    init: how A and B begin, see `init.py`; the model's output is unchanged at first, up to rounding with pissa, olora
        and dora.
    bias: train no biases, those of the adapted layers, or all. also_train: modules to train whole, named like
        targets (a new classifier head).
    dtype: of the factors; by default the weight's, or float32 beside float16 and bfloat16 weights.
    freeze: freeze every parameter that the adapter does not train, and the running statistics of norms with it.

    Returns a Report; print it. Raises ValueError, before anything is changed, when a pattern matches nothing or a
    target cannot be adapted. Neither the mode (train/eval) nor any existing tensor is changed.
    """
    model = unwrapped(model)
    _check(rank, alpha, dropout, init)
    selection = select(model, targets)
    names = list(selection.targets)
    ranks = pattern_values(rank_pattern or {}, names, "rank_pattern")
    alphas = pattern_values(alpha_pattern or {}, names, "alpha_pattern")
    sizes = pattern_values(splits or {}, names, "splits")
    blocks = {
        name: _blocks(name, selection.targets[name], ranks.get(name, rank), sizes.get(name))
        for name in names
        if name in sizes or isinstance(ranks.get(name), Sequence)
    }
    if blocks and (dora or init not in RANDOM_INITS):
        raise ValueError(
            f"{next(iter(blocks))!r} is adapted in blocks, where dora and the init {init!r} have no meaning: they take "
            f"the whole weight. Use dora=False and one of the inits {', '.join(map(repr, RANDOM_INITS))}."
        )
    for name, target in selection.targets.items():
        if target.parameter:
            _check_parameter(name, target, dropout, dora, init)
        elif (dora or init not in RANDOM_INITS) and issubclass(layer_class(target.module) or Linear, Beside):
            raise ValueError(
                f"{name!r} is a {type(target.module).__name__}, which computes output or weight in its own way: "
                "dora and the inits that take factors from the weight need the weight itself. Use dora=False and "
                f"one of the inits {', '.join(map(repr, RANDOM_INITS))}, or leave it out of the targets."
            )
    settings: dict[str, tuple[int, float]] = {}
    for name in names:
        own_rank = max(own for _, own in blocks[name]) if name in blocks else ranks.get(name, rank)
        assert isinstance(own_rank, int)
        own_alpha = alphas.get(name, 2 * own_rank if alpha is None else alpha)
        _check(own_rank, own_alpha, dropout, init)
        if init not in RANDOM_INITS:
            limit = min(selection.targets[name].weight.flatten(1).shape)
            if own_rank > limit:
                raise ValueError(
                    f"{name!r} has a weight of rank {limit} at most: init={init!r} cannot take rank={own_rank}."
                )
        settings[name] = own_rank, own_alpha
    whole = _modules_trained_whole(model, also_train, selection)
    bias_names(model, bias)  # refuses an unknown word before anything changes

    with unchanged_on_error(model):
        for name, target in selection.targets.items():
            own_rank, own_alpha = settings[name]
            layer = adopt(target, dropout, blocks.get(name, ()))
            layer.create_update(
                own_rank, own_alpha, rslora=rslora, dora=dora, init=init, dtype=dtype or factor_dtype(layer.like)
            )
        trained = choose_trainable(model, whole, bias, freeze=freeze)
        note_adapted(model)
        return _report(model, selection, trained)


def adopt(target: Target, dropout: float, blocks: Blocks = ()) -> AdaptedLayer:
    """Change the class of a plain layer, or of the module that owns a parameter, to its adapted one.

    Returns the adapted layer, which has no update yet. blocks: (size, rank) of each block of a fused output.
    """
    module = target.module
    if target.parameter:
        change_class(module, type(module))  # `adapt_parameter` makes a class of it and of what is adapted
        return adapt_parameter(module, target.parameter)
    cls = MergedLinear if blocks else layer_class(module)
    assert cls is not None, "select() lets only adaptable modules through"
    transposed = is_transposed(module)
    change_class(module, cls)
    assert isinstance(module, AdaptedLayer)
    LoRALayer.__init__(module, 0, 0.0, dropout, merge_weights=False)
    # A weight that is computed has no place where the sum could be.
    module.read_as_sum = not isinstance(module, Beside) or "weight" in module._parameters
    if isinstance(module, Embedding):
        module.read_whole = target.read_whole
    if dropout > 0:
        module.lora_dropout = QuickDropout(dropout).train(module.training)
    if isinstance(module, MergedLinear):
        module.set_blocks(blocks)
    if transposed:
        module.fan_in_fan_out = True  # type: ignore[assignment]
        module.in_features, module.out_features = module.weight.shape  # type: ignore[assignment]
    return module


def factor_dtype(weight: Tensor) -> torch.dtype:
    """float32 beside half-precision weights: a step of the optimizer is too small for them to hold."""
    return torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype


def choose_trainable(model: nn.Module, whole: Iterable[str], bias: Bias, *, freeze: bool) -> tuple[str, ...]:
    """Set `requires_grad` for the adapter, the modules trained whole and the biases; note what it was.

    A module that is trained whole and tied to another one gets a weight of its own.

    Returns the names of the parameters trained beside the factors.
    """
    whole = tuple(whole)
    if any(undo.swapped for module in model.modules() if (undo := note(module))):
        raise ValueError("the model is inside lorakit.disabled, where it is the base model. Leave that first.")
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
    """Note the values of these tensors, which an adapter is about to set, trained or not: they are a part of it."""
    # Once for each: what exchanges the values must find a tied one once.
    noted = {id(tensor) for tensor in trained_whole(model)[0].values()}
    for name in names:
        owner, _, local = name.rpartition(".")
        module = unwrapped(model.get_submodule(owner))
        tensor = own_tensor(module, local)
        if id(tensor) not in noted:
            undo_of(module).trained[local] = tensor.detach().clone()
            noted.add(id(tensor))


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers and parameters with an update, by name; a shared one once."""
    return {
        module.public_name(name) if isinstance(module, AdaptedParameter) else name: module
        for name, module in named_modules(model)
        if isinstance(module, AdaptedLayer) and module.has_update
    }


def note_adapted(model: nn.Module) -> None:
    """Keep on the model what is adapted now, and the base's statistics: they tell later what is gone or has moved."""
    layers = adapted_layers(model)
    for layer in layers.values():
        layer.forget()
    remember(model, layers)
    Record.note(model)


def trained_whole(model: nn.Module) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors that `attach` set to be trained beside the factors, and the modules named in `also_train`.

    Their trained values, also inside `disabled`.
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
    stays_merged = any(layer.merged for layer in adapted_layers(model).values())
    for module in model.modules():
        restore(module, keep_trained=stays_merged)
    Record.drop(model)


def merge(model: nn.Module, *, force: bool = False) -> None:
    """Fold the update into each adapted layer's weight: W ← W + s·ΔW, rounded once. `unmerge` restores every bit.

    Raises ValueError where training passed over an adapted layer, or another module took the place of one (see
    `diagnose`), unless `force` is given; and for a layer that does not use its weight as it is.
    """
    layers = _layers_or_error(model)
    if not force:
        refuse_replaced(model)
        refuse_silent(model, layers, "Leave them out of the targets, or merge with force=True.")
    for name, layer in layers.items():
        if reason := layer.merge_refusal():
            raise ValueError(f"{name!r} cannot be merged: {reason}. Leave the model unmerged.")
    for layer in layers.values():
        layer.merge()


def unmerge(model: nn.Module) -> None:
    """Take `merge` back: the weights are the same objects with the same bits as before."""
    for layer in _layers_or_error(model).values():
        layer.unmerge()


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, `model` is the base model: no update, and the values that heads and biases had before training.

    It may be entered again inside, for a part of the model too, from threads and from generators: as long as anyone is
    inside, the model is the base model for everyone. What `merge`, `eval()` or `train()` ask of the layers inside
    happens when the last one leaves.
    """
    with _switching:
        layers = list(adapted_layers(model).values())
        notes = [(module, undo) for module in model.modules() if (undo := note(module))]
        for layer in layers:
            layer.disable()
        for module, undo in notes:
            undo.swapped += 1
            if undo.swapped == 1:
                undo.swap(module)
    try:
        yield model
    finally:
        with _switching:
            for module, undo in notes:
                undo.swapped -= 1
                if undo.swapped == 0 and note(module) is undo:  # not detached meanwhile
                    undo.swap(module)
            for layer in layers:
                if isinstance(layer, AdaptedLayer) and layer.has_update:
                    layer.enable()


def _check(rank: int, alpha: float | None, dropout: float, init: str) -> None:
    if rank < 1:
        raise ValueError(f"rank={rank}: a rank is at least 1.")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"alpha={alpha}: expected a positive number, or None for 2·rank.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: a probability in [0, 1) is expected.")
    if init not in INITS:
        raise ValueError(f"init={init!r}: expected one of {', '.join(map(repr, INITS))}.")


def _check_parameter(name: str, target: Target, dropout: float, dora: bool, init: Init) -> None:
    """Refuse what has no meaning for a parameter that is read."""
    what = f"{name!r} is a weight that {type(target.module).__name__} or its parent reads"
    if dropout > 0:
        raise ValueError(f"{what}, so its update has no input to drop: use dropout=0, or leave it out of the targets.")
    if target.weight.dim() == 3 and (dora or init not in RANDOM_INITS):
        raise ValueError(
            f"{what}, with a matrix for each expert: use dora=False and one of the inits "
            f"{', '.join(map(repr, RANDOM_INITS))}."
        )


def _blocks(name: str, target: Target, rank: int | Sequence[int], sizes: Sequence[int] | None) -> Blocks:
    """(size, rank) of each block of a fused linear layer's output."""
    module = target.module
    if target.parameter or layer_class(module) is not Linear:
        kind = "parameter" if target.parameter else type(module).__name__
        raise ValueError(f"{name!r} is a {kind}: only the output of a linear layer comes in blocks.")
    try:
        blocks = blocks_of(target.weight.shape[1 if is_transposed(module) else 0], rank, splits=sizes)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None
    if not any(own for _, own in blocks):
        raise ValueError(f"{name!r}: every block has rank 0; leave the module out of the targets.")
    return blocks


def _modules_trained_whole(model: nn.Module, also_train: Iterable[str], selection: Selection) -> list[str]:
    patterns = [also_train] if isinstance(also_train, str) else list(also_train)
    names = list(dict.fromkeys(name for name, _ in named_modules(model) if name))
    held = held_tables(model)
    chosen: list[str] = []
    for pattern in patterns:
        hits = matching(pattern, names)
        if not hits:
            raise ValueError(f"also_train={pattern!r} matches no module. {closest(pattern, names)}".rstrip())
        for name in hits:
            if name in held:
                raise ValueError(f"also_train={pattern!r} cannot be trained: {held_refusal(held[name])}.")
            inside = [target for target in selection.targets if f"{target}.".startswith(f"{name}.")]
            if inside:
                raise ValueError(
                    f"also_train={pattern!r} trains {name!r} whole, but targets adapts {inside[0]!r} in it. Choose one."
                )
        chosen += hits
    return chosen


def _layers_or_error(model: nn.Module) -> dict[str, AdaptedLayer]:
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no adapted layer: call lorakit.attach or lorakit.load first.")
    return layers


def _report(model: nn.Module, selection: Selection, trained: tuple[str, ...]) -> Report:
    layers = adapted_layers(model)
    rows = []
    for name in selection.targets:
        layer = layers[name]
        outputs, inputs = layer.size()
        count = sum(p.numel() for local, p in layer.named_parameters(recurse=False) if local.startswith("lora_"))
        rows.append(Row(name, type(layer).__name__, (inputs, outputs), layer.r, count))
    sized = [p for p in model.parameters() if not is_lazy(p)]
    trainable = sum(p.numel() for p in sized if p.requires_grad)
    total = sum(p.numel() for p in sized)
    return Report(tuple(rows), trained, selection.skipped, trainable, total)
