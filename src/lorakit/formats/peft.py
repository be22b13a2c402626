"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, what most programs read.

    Linear, transformers' Conv1D   .lora_A.weight (r, in)        .lora_B.weight (out, r)
    Embedding                      .lora_embedding_A (r, vocab)  .lora_embedding_B (dim, r)
    convolution                    .lora_A.weight (r, in, *k)    .lora_B.weight (out, r, 1, …)
    DoRA                           .lora_magnitude_vector (out); convolution (1, out, 1, …)
    trained whole                  <parameter>;  a bias of an adapted layer: .base_layer.bias
    rows of a token table          .token_adapter.trainable_tokens_delta (k, dim), whose tokens the configuration has

Every key begins with `base_model.model.`. Parameters that are adapted without a layer have other names there
(`peft_names.py`). Some updates are written as the PEFT layer that computes the same. A MergedLinear is one pair with a
block-diagonal B, whose rank is the sum of its blocks' ranks. A grouped convolution, whose groups share A, has A
repeated along the diagonal, and its rank is r times the groups. Experts have A (experts·r, in), expert by expert, and B
(out, r·experts), whose columns run over the experts first.

Reading refuses what it cannot place. PEFT itself drops unknown tensors silently.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.adapter import Adapter, TokenRows, Update
from ..core.errors import LoraError
from ..core.host import Host
from ..core.init import olora, pissa
from ..core.layouts import Kernel, Layout, Lookup, Matrix, Stack
from .files import check_tensors, read_pickled, read_safetensors, replacing
from .foreign import refuse
from .peft_config import CONFIG as CONFIG
from .peft_config import PeftConfig, first_match, read_config
from .peft_experts import VERSIONS, Era, FileOfStacks, flattened, stacked, turned
from .peft_keys import PREFIX, ROWS, Sorted, saved_whole, sort
from .peft_names import Names, Place, places, target_names, wrapped
from .tensors import write_tensors

TENSORS, LEGACY_TENSORS = "adapter_model.safetensors", "adapter_model.bin"
FILES = (CONFIG, TENSORS, LEGACY_TENSORS)
name = "peft"
limits = (
    "It holds no loralib convolution (another rank), no DoRA on some modules only, and no update of an attention's "
    "out_proj without its in_proj; these two must have one rank and alpha. PEFT itself ignores what it cannot place."
)


def recognises(path: Path) -> bool:
    """Always true: this format gets what no other one recognises, and `read` says what is wrong with it."""
    return True


def write(adapter: Adapter, folder: str | Path) -> None:
    """Write the two files into `folder`, each complete or not at all.

    Raises LoraError for what the format cannot hold: loralib's convolutions (another rank), DoRA on some modules
    only, a tensor that is empty, not finite or of integers.
    """
    write_of(adapter, folder, "new")


def write_of(adapter: Adapter, folder: str | Path, era: Era) -> None:
    """The same, with the stacks of experts as the PEFT of that time has them."""
    updates = {name: _as_peft(name, update, era) for name, update in adapter.updates.items()}
    where = places(adapter.updates)
    tensors = _tensors(updates, where, adapter, folder)
    config = _config(updates, where, adapter, era)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TENSORS) as path:
        write_tensors(tensors, path)
    with replacing(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def config_fields(adapter: Adapter) -> dict[str, Any]:
    """The fields of PEFT's configuration for this adapter, as `write` writes them. Raises what it does."""
    updates = {name: _as_peft(name, update, "new") for name, update in adapter.updates.items()}
    return _config(updates, places(adapter.updates), adapter, "new")


def read(path: str | Path, host: Host | None = None, alpha: float | None = None) -> Adapter:
    """The adapter in a folder, which may be given by one of its files. The names are those in the file.

    Raises FileNotFoundError, or LoraError naming the file and what is wrong with it. alpha: the folder has it; ignored.

    host: the model that it is read for. Without one, an attention is named instead of its parameter, experts'
    parameters come in the order of the configuration, and an update relative to W less a part of it is refused.
    """
    return _read(path, host, as_stored=False)


def stored_adapter(path: str | Path) -> Adapter:
    """What a folder holds, to look at: names, shapes, settings, what was trained whole. Raises what `read` does.

    An update relative to W less a part of it is given as it is stored, so it is not an update of W: do not insert it.
    """
    return _read(path, None, as_stored=True)


def _read(path: str | Path, host: Host | None, *, as_stored: bool) -> Adapter:
    path = Path(path)
    if host is not None and not path.exists():
        raise FileNotFoundError(f"{path}: no such adapter folder.")
    folder = path.parent if path.name in FILES else path
    if folder.is_file():
        refuse(folder)
    config = read_config(folder)
    path, tensors = _read_tensors(folder)
    found = sort(tensors, config, str(path), None if host is None else host.modules)
    try:
        if host is not None:
            _check_saved(config, found.trained, host)
        updates = _updates(found, config, host, as_stored)
        rows = _token_rows(found, config)
    except ValueError as error:
        raise LoraError(f"{path}: {error}") from None
    targets = config.target_modules
    return Adapter(
        updates=updates,
        trained=found.trained,
        also_train=saved_whole(config, found.trained),
        bias=config.bias,
        dropout=config.lora_dropout,
        targets=(targets, *config.target_parameters)
        if isinstance(targets, str)
        else tuple(sorted((*targets, *config.target_parameters))),
        base_model=config.base_model,
        task_type=config.task_type,
        token_rows=rows,
    )


# --- writing -------------------------------------------------------------------------------------------------------


def _as_peft(name: str, update: Update, era: Era) -> Update:
    """`update` with its factors as PEFT's layers have them."""
    if isinstance(update.layout, Stack):
        A, B = flattened(*turned(name, update.A, update.B, update.layout, era))
        return dataclasses.replace(update, A=A, B=B)
    try:
        return update.pair()
    except ValueError as error:
        raise LoraError(f"{name}: {error}") from None


def _tensors(
    updates: Mapping[str, Update], where: Mapping[str, Place], adapter: Adapter, folder: str | Path
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if isinstance(update.layout, Lookup)
            else ("lora_A.weight", "lora_B.weight")
        )
        path = f"{PREFIX}{where[name].path}"
        tensors[f"{path}.{a}"], tensors[f"{path}.{b}"] = update.A, update.B
        if update.magnitude is not None:
            shape = (1, -1, *(1,) * (update.A.dim() - 2)) if isinstance(update.layout, Kernel) else (-1,)
            tensors[f"{path}.lora_magnitude_vector"] = update.magnitude.view(shape)
    inside = wrapped(where)
    for name, value in adapter.trained.items():
        module, _, local = name.rpartition(".")
        path = inside.get(module, module)
        tensors[f"{PREFIX}{path}.{local}" if path else PREFIX + local] = value
    tensors |= {f"{PREFIX}{name}{ROWS}": rows.values for name, rows in adapter.token_rows.items()}
    check_tensors(tensors, f"{folder} is not saved: ")
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _config(updates: Mapping[str, Update], where: Mapping[str, Place], adapter: Adapter, era: Era) -> dict[str, Any]:
    with_dora = {name for name, update in updates.items() if update.magnitude is not None}
    if with_dora and len(with_dora) < len(updates):
        raise LoraError("PEFT's folder holds DoRA for all modules or for none; here some modules have it and some not.")
    rslora = bool(updates) and all(update.rslora for update in updates.values())
    # If some updates use rsLoRA's scale and some do not, all are written with the scale α/r.
    alphas = {n: u.alpha if u.rslora == rslora else u.scale * u.rank for n, u in updates.items()}
    rank, rank_pattern = _default_and_pattern({where[name].key: update.rank for name, update in updates.items()})
    alpha, alpha_pattern = _default_and_pattern({where[name].key: alpha for name, alpha in alphas.items()})
    parameters = target_names("target_parameters", where, adapter.targets)
    tokens = {name: list(rows.tokens) for name, rows in adapter.token_rows.items()}
    return {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": adapter.base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "target_modules": target_names("target_modules", where, adapter.targets),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
        "use_dora": bool(with_dora),
        "fan_in_fan_out": any(update.fan_in_fan_out for update in updates.values()),
        "bias": adapter.bias,
        "modules_to_save": sorted(adapter.also_train) or None,
        **({"trainable_token_indices": tokens} if tokens else {}),
        "init_lora_weights": True,
        "inference_mode": True,
        # The version whose layout the stacks have: it tells W from Wᵀ where the matrices are square.
        **({"target_parameters": parameters, "peft_version": VERSIONS[era]} if parameters else {}),
    }


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the others by module name. Whole numbers are written as integers.

    A name is a pattern for the end of names. If it would also select a module with another value, it is anchored.
    """
    tidy = {name: int(value) if float(value).is_integer() else value for name, value in values.items()}
    default = Counter(tidy.values()).most_common(1)[0][0] if tidy else 8

    def pattern(name: str, value: float) -> str:
        selected = (other for other in tidy if first_match({name: True}, other, False))
        return name if all(tidy[other] == value for other in selected) else f"^{re.escape(name)}"

    return default, {pattern(name, value): value for name, value in tidy.items() if value != default}


# --- reading -------------------------------------------------------------------------------------------------------


def _read_tensors(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of the tensors, and what it holds."""
    path = next((folder / name for name in (TENSORS, LEGACY_TENSORS) if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has {CONFIG} but no {TENSORS}.")
    tensors = read_safetensors(path) if path.name == TENSORS else read_pickled(path)
    check_tensors(tensors, f"{path}: ")
    return path, tensors


def _check_saved(config: PeftConfig, trained: Mapping[str, Tensor], host: Host) -> None:
    """Raise LoraError if `modules_to_save` names a module of the model and the file has no tensors of it."""
    owners = {name.rpartition(".")[0] for name in trained}
    for end in config.modules_to_save:
        named = [
            name
            for name, module in host.modules.items()
            if name.endswith(end) and any(True for _ in module.parameters())
        ]
        held = any(f"{owner}.".startswith(f"{name}.") for name in named for owner in owners)
        if named and not held and not any(owner.endswith(end) for owner in owners):
            raise LoraError(f"it has no tensor of {named[0]}, which modules_to_save={end!r} names.")


def _updates(found: Sorted, config: PeftConfig, host: Host | None, as_stored: bool) -> dict[str, Update]:
    names = Names(config.target_parameters, None if host is None else host.matrices)
    updates: dict[str, Update] = {}
    for path, parts in found.factors.items():
        name, key = names.name_and_key(path)
        layout = Lookup() if path in found.embeddings else Matrix() if parts["A"].dim() == 2 else Kernel()
        updates[name] = _update(name, layout, parts, config.rank_of(key), config.alpha_of(key), config)
    stacks = {name: update for name, update in updates.items() if isinstance(update.layout, Stack)}
    file = FileOfStacks(config, host, [(name, update.A, update.B) for name, update in stacks.items()])
    for name, update in stacks.items():
        own, A, B = file.read(name, update.A, update.B)
        updates[name] = dataclasses.replace(update, layout=own, A=A, B=B, parameter=name.rpartition(".")[2])
    if config.residual and not as_stored:
        updates = {name: _at_the_base(name, update, config, host) for name, update in updates.items()}
    return updates


def _token_rows(found: Sorted, config: PeftConfig) -> dict[str, TokenRows]:
    rows: dict[str, TokenRows] = {}
    for name, values in found.rows.items():
        tokens = config.tokens_of(name)
        if values.dim() != 2 or len(values) != len(tokens):
            raise LoraError(
                f"{name} has trained rows {tuple(values.shape)}, and trainable_token_indices in {CONFIG} names "
                f"{len(tokens)} tokens for it."
            )
        order = sorted(range(len(tokens)), key=tokens.__getitem__)
        rows[name] = TokenRows(tuple(tokens[place] for place in order), values[order])
    # Of tied tables PEFT writes one.
    held = {frozenset(own.tokens) for own in rows.values()}
    for table, tokens in config.token_indices.items():
        if frozenset(tokens) not in held:
            raise LoraError(
                f"it has no trained rows of {table or 'a token table'}, which trainable_token_indices names."
            )
    return rows


def _update(
    name: str, layout: Layout, parts: Mapping[str, Tensor], rank: int, alpha: float, config: PeftConfig
) -> Update:
    A, B, magnitude = parts["A"], parts["B"], parts.get("magnitude")
    if A.dim() != B.dim() or A.dim() < 2:
        raise LoraError(f"{name}: A {tuple(A.shape)} and B {tuple(B.shape)} are not a pair of factors.")
    if (magnitude is not None) != config.use_dora:
        has = "has a magnitude" if magnitude is not None else "has no magnitude"
        raise LoraError(f"{name} {has}, and {CONFIG} says use_dora={config.use_dora}.")
    experts = A.shape[0] // rank
    stack = config.target_parameters and isinstance(layout, Matrix) and experts > 1 and A.shape[0] == B.shape[1]
    if stack and A.shape[0] == experts * rank:
        layout, (A, B) = Stack(), stacked(A, B, experts, rank)
    elif A.shape[0] != rank:
        raise LoraError(f"{name}: A has rank {A.shape[0]}, {config.path} says {rank}.")
    elif isinstance(layout, Kernel) and rank % B.shape[1] == 0 and B.shape[1] < rank:
        return _as_grouped(name, Update(layout, A, B, rank, alpha, config.use_rslora, magnitude), rank // B.shape[1])
    elif B.shape[1] != rank:
        raise LoraError(f"{name}: A has rank {rank}, B {B.shape[1]}.")
    magnitude = None if magnitude is None else magnitude.flatten()
    return Update(layout, A, B, rank, alpha, config.use_rslora, magnitude, config.fan_in_fan_out)


def _as_grouped(name: str, update: Update, groups: int) -> Update:
    """PEFT's grouped convolution as an update of the grouped kernel, if it is one.

    PEFT's A (r, in, *k) reads all channels, and each group of B (out, r/groups, 1, …) reads r/groups rows of it. This
    is an update of the kernel only if the rows of each group read only that group's channels.
    """
    total, channels, *kernel = update.A.shape
    outputs, own_rank = update.B.shape[:2]
    if channels % groups or outputs % groups:
        raise LoraError(f"{name}: {channels} channels and {outputs} outputs do not divide into {groups} groups.")
    A = update.A.view(groups, own_rank, groups, channels // groups, *kernel)
    B = update.B.reshape(groups, outputs // groups, own_rank)
    # A row that no output of its group uses may read any channel.
    A = A * B.ne(0).any(1).view(groups, own_rank, 1, 1, *(1 for _ in kernel))
    own = torch.stack([A[group, :, group] for group in range(groups)])  # (groups, r/groups, in/groups, *k)
    full = torch.zeros_like(A)
    for group in range(groups):
        full[group, :, group] = own[group]
    if not torch.equal(full, A):
        raise LoraError(
            f"{name}: this update of a convolution with {groups} groups reads channels of other groups, so it is no "
            "update of the kernel and cannot be merged."
        )
    magnitude = None if update.magnitude is None else update.magnitude.flatten()
    used = [group for group in range(groups) if B[group].ne(0).any()]
    if all(torch.equal(own[group], own[used[0]]) for group in used):
        shared = own[used[0]] if used else own[0]
        return update.with_factors(Kernel(groups), shared.clone(), update.B, magnitude=magnitude)
    if magnitude is not None and outputs != groups:
        raise LoraError(
            f"{name}: PEFT's DoRA of a convolution with {groups} groups and {outputs} outputs divides by the norm of "
            "another matrix than W + ΔW, because its groups do not share A: no gain of rows is the same function."
        )
    # Each group takes its own rows out of the A of all groups.
    wide = B.new_zeros(groups, outputs // groups, groups, own_rank)
    for group in range(groups):
        wide[group, :, group] = B[group]
    ones = (1 for _ in kernel)
    return dataclasses.replace(
        update,
        A=own.flatten(0, 1),
        B=wide.reshape(outputs, total, *ones),
        layout=Kernel(groups),
        magnitude=magnitude,
    )


def _at_the_base(name: str, update: Update, config: PeftConfig, host: Host | None) -> Update:
    """An update that is added to W − s·B₀A₀, as one that is added to W: [A; A₀] and [B, −B₀], with twice the rank.

    B₀A₀ is a part of the base weight. PEFT computes it again each time that it reads such a folder.
    """
    assert config.residual
    what = f"init_lora_weights={config.residual!r}"
    if host is None:
        raise LoraError(f"{config.path}: {what} counts from a part of the base weights: read it for a model.")
    weight = host.weight(name)
    if weight is None or not isinstance(update.layout, Matrix):
        raise LoraError(
            f"{config.path}: {what}: {name} is not a linear layer of {type(host.model).__name__} with a plain weight."
        )
    if weight.shape != (update.B.shape[0], update.A.shape[1]):
        return update  # it does not fit, and `insert` says so
    weight = weight.detach().cpu()
    if config.residual == "olora" and host.stored_transposed(name):
        # PEFT takes the factors of the matrix as it is stored, which is the transposed one.
        B, A = (part.T for part in olora(weight.T, update.rank, update.scale))
    elif config.residual == "olora":
        A, B = olora(weight, update.rank, update.scale)
    else:
        A, B = pissa(weight, update.rank, update.scale, exact=True)
    A, B = torch.cat((update.A, A.to(update.A.dtype))), torch.cat((update.B, -B.to(update.B.dtype)), 1)
    return update.with_factors(update.layout, A, B)
