"""PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, what most programs read.

    Linear, transformers' Conv1D   .lora_A.weight (r, in)        .lora_B.weight (out, r)
    Embedding                      .lora_embedding_A (r, vocab)  .lora_embedding_B (dim, r)
    convolution                    .lora_A.weight (r, in, *k)    .lora_B.weight (out, r, 1, …)
    DoRA                           .lora_magnitude_vector (out); convolution (1, out, 1, …)
    trained whole                  <parameter>;  a bias of an adapted layer: .base_layer.bias

Every key begins with `base_model.model.`; parameters that are adapted without a layer have names of their own there
(`peft_names.py`). Some updates are written as the PEFT layer of the same function: a MergedLinear as one pair with a
block-diagonal B, of the sum of its blocks' ranks; a grouped convolution, whose groups share A, with A repeated along
the diagonal, of rank times the groups; experts with A (experts·r, in), expert by expert, and B (out, r·experts), whose
columns run over the experts first.

Reading refuses what it cannot place: PEFT itself drops unknown tensors without a word.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..core.adapter import Adapter, Kind, Update
from ..core.targets import matching
from .files import replacing
from .peft_names import Names, Place, places, plain, target_names, wrapped
from .tensors import write_tensors

CONFIG, TENSORS, LEGACY_TENSORS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_SUFFIXES: dict[str, tuple[str, str]] = {  # end of the key → (Update field, kind; "" where the shape tells)
    ".lora_A.weight": ("A", ""),
    ".lora_B.weight": ("B", ""),
    ".lora_embedding_A": ("A", "embedding"),
    ".lora_embedding_B": ("B", "embedding"),
    ".lora_magnitude_vector": ("magnitude", ""),
    ".lora_magnitude_vector.weight": ("magnitude", ""),
}


def write(adapter: Adapter, folder: str | Path) -> None:
    """Write the two files into `folder`, each complete or not at all.

    Raises ValueError for what the format cannot hold: loralib's convolutions (another rank), DoRA on some modules
    only, an empty or non-finite tensor.
    """
    updates = {name: _as_peft(name, update) for name, update in adapter.updates.items()}
    where = places(adapter.updates)
    tensors = _tensors(updates, where, adapter)
    for key, tensor in tensors.items():
        if tensor.numel() == 0:
            raise ValueError(f"{key} is empty: a sharded model must be gathered before its adapter is saved.")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds NaN or infinite numbers; the adapter is not saved.")
    config = _config(updates, where, adapter)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / TENSORS) as path:
        write_tensors(tensors, path)
    with replacing(folder / CONFIG) as path:
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read(folder: str | Path, parameters: Mapping[str, tuple[str, ...]] | None = None) -> Adapter:
    """The adapter in `folder`. Raises FileNotFoundError, or ValueError naming every key that has no place.

    parameters: the names of the matrices that each module of the model owns (`core.exchange.owned_matrices`). Without
    them an attention is named instead of its parameter, and experts' parameters come in the order of the configuration.
    """
    folder = Path(folder)
    config = _read_config(folder)
    names = Names(config.get("target_parameters") or (), parameters)
    tensors = _read_tensors(folder)
    fields: dict[str, dict[str, Tensor]] = {}
    kinds: dict[str, Kind] = {}
    trained: dict[str, Tensor] = {}
    homeless: list[str] = []
    for key, tensor in sorted(tensors.items()):
        path = key.removeprefix(_PREFIX)
        suffix = next((end for end in _SUFFIXES if path.endswith(end)), None)
        if suffix is not None:
            name = path.removesuffix(suffix)
            what, kind = _SUFFIXES[suffix]
            fields.setdefault(name, {})[what] = tensor
            if what == "A":
                kinds[name] = "embedding" if kind else "linear" if tensor.dim() == 2 else "conv"
        elif "lora_" in path or ".token_adapter." in path or path == key:
            homeless.append(key)
        elif ".original_module." not in path:  # with bias="all" PEFT also saves the untrained copy of a head's bias
            trained[plain(path)] = tensor
    homeless += [f"{name}.lora_*" for name, parts in fields.items() if not {"A", "B"} <= parts.keys()]
    if homeless or not (fields or trained):
        listed = "\n".join(f"  {key}" for key in homeless[:20]) or "  (no tensor at all)"
        raise ValueError(f"{folder / TENSORS}: keys that no LoRA layer of lorakit has:\n{listed}")
    settings = _settings(config)
    updates: dict[str, Update] = {}
    for path, parts in fields.items():
        name, key = names.name_and_key(path)
        updates[name] = _update(name, kinds[path], parts, *settings(key), config)
    also_train = _modules_to_save(config, trained)
    return Adapter(
        updates=updates,
        trained=trained,
        also_train=also_train,
        bias=config.get("bias") or "none",
        dropout=float(config.get("lora_dropout") or 0.0),
        targets=_targets(config),
        base_model=config.get("base_model_name_or_path"),
        task_type=config.get("task_type"),
    )


# --- writing -------------------------------------------------------------------------------------------------------


def _as_peft(name: str, update: Update) -> Update:
    """`update` as a kind that PEFT has."""
    if update.kind == "conv_loralib":
        raise ValueError(
            f"{name}: a convolution made by loralib's constructor has another rank than PEFT's (r times the kernel "
            "size) and cannot be written exactly. Save it as a .pt file, or use attach() on a plain convolution."
        )
    update = update.without_blocks()
    if update.kind == "conv" and update.groups > 1:
        A = _repeat_along_diagonal(update.A, update.groups)
        return update.with_rank(A.shape[0], A=A)
    if update.kind == "experts":
        return dataclasses.replace(update, A=update.A.flatten(0, 1), B=update.B.permute(1, 2, 0).flatten(1))
    return update


def _repeat_along_diagonal(A: Tensor, groups: int) -> Tensor:
    """A (r, in/groups, *k), which all groups share, as (groups·r, in, *k): a copy for each group's channels."""
    rank, channels, *kernel = A.shape
    full = A.new_zeros(groups, rank, groups, channels, *kernel)
    for group in range(groups):
        full[group, :, group] = A
    return full.view(groups * rank, groups * channels, *kernel)


def _tensors(updates: Mapping[str, Update], where: Mapping[str, Place], adapter: Adapter) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, update in updates.items():
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if update.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        B = update.B
        if update.kind == "conv" and update.groups > 1:
            B = B.view(B.shape[0], -1, *B.shape[2:])
        path = f"{_PREFIX}{where[name].path}"
        tensors[f"{path}.{a}"], tensors[f"{path}.{b}"] = update.A, B
        if update.magnitude is not None:
            shape = (1, -1, *(1,) * (update.A.dim() - 2)) if update.kind == "conv" else (-1,)
            tensors[f"{path}.lora_magnitude_vector"] = update.magnitude.view(shape)
    for name, value in adapter.trained.items():
        module, _, local = name.rpartition(".")
        path = wrapped(module, where)
        tensors[f"{_PREFIX}{path}.{local}" if path else _PREFIX + local] = value
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _config(updates: Mapping[str, Update], where: Mapping[str, Place], adapter: Adapter) -> dict[str, Any]:
    with_dora = {name for name, update in updates.items() if update.magnitude is not None}
    if with_dora and len(with_dora) < len(updates):
        raise ValueError(
            "PEFT's folder holds DoRA for all modules or for none; here some modules have it and some not."
        )
    rslora = bool(updates) and all(update.rslora for update in updates.values())
    # Where the two scales are mixed, α/r says it for all.
    alphas = {n: u.alpha if u.rslora == rslora else u.scale * u.rank for n, u in updates.items()}
    rank, rank_pattern = _default_and_pattern({where[name].key: update.rank for name, update in updates.items()})
    alpha, alpha_pattern = _default_and_pattern({where[name].key: alpha for name, alpha in alphas.items()})
    parameters = target_names("target_parameters", where, adapter.targets)
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
        "init_lora_weights": True,
        "inference_mode": True,
        **({"target_parameters": parameters} if parameters else {}),
    }


def _default_and_pattern(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest value, and the others by module name. Whole numbers are written as integers."""
    tidy = {name: int(value) if float(value).is_integer() else value for name, value in values.items()}
    default = Counter(tidy.values()).most_common(1)[0][0] if tidy else 8
    return default, {name: value for name, value in tidy.items() if value != default}


# --- reading -------------------------------------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG}.")
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}.") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; lorakit reads LORA adapters.")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    if (folder / TENSORS).is_file():
        try:
            # Not load_file, which leaves some bytes behind for each tensor (safetensors 0.8), and maps the file.
            return safetensors.torch.load((folder / TENSORS).read_bytes())
        except safetensors.SafetensorError as error:
            raise ValueError(f"{folder / TENSORS}: not a complete safetensors file ({error}).") from None
    if (folder / LEGACY_TENSORS).is_file():
        legacy: dict[str, Tensor] = torch.load(folder / LEGACY_TENSORS, map_location="cpu", weights_only=True)
        return legacy
    raise FileNotFoundError(f"{folder} has {CONFIG} but no {TENSORS}.")


def _settings(config: dict[str, Any]) -> Callable[[str], tuple[int, float]]:
    """Rank and alpha by name, patterns applied as PEFT applies them (a regular expression on the name's end)."""
    rank_of = _pattern_lookup(config.get("rank_pattern") or {}, config["r"])
    alpha_of = _pattern_lookup(config.get("alpha_pattern") or {}, config["lora_alpha"])
    return lambda name: (int(rank_of(name)), float(alpha_of(name)))


def _pattern_lookup(patterns: Mapping[str, float], default: float) -> Callable[[str], float]:
    compiled = [(re.compile(rf"(.*\.)?({pattern})$"), value) for pattern, value in patterns.items()]
    return lambda name: next((value for pattern, value in compiled if pattern.match(name)), default)


def _update(name: str, kind: Kind, parts: dict[str, Tensor], rank: int, alpha: float, config: dict[str, Any]) -> Update:
    A, B = parts["A"], parts["B"]
    experts = A.shape[0] // rank
    if config.get("target_parameters") and kind == "linear" and experts > 1 and A.shape[0] == B.shape[1]:
        kind, A, B = "experts", A.unflatten(0, (experts, rank)), B.unflatten(1, (rank, experts)).permute(2, 0, 1)
    elif A.shape[0] != rank:
        raise ValueError(f"{name}: A has rank {A.shape[0]}, {CONFIG} says {rank}.")
    magnitude = parts["magnitude"].flatten() if "magnitude" in parts else None
    update = Update(
        kind, A, B, rank, alpha, bool(config.get("use_rslora")), magnitude, bool(config.get("fan_in_fan_out"))
    )
    if kind == "conv" and B.shape[1] != rank:
        return _as_grouped(name, update, groups=rank // B.shape[1])
    return update


def _as_grouped(name: str, update: Update, groups: int) -> Update:
    """PEFT's grouped convolution (A over all channels, B grouped) as an update of the grouped kernel, if it is one."""
    total, channels, *kernel = update.A.shape
    shared = update.A.view(groups, total // groups, groups, channels // groups, *kernel)[0, :, 0]
    if not torch.equal(_repeat_along_diagonal(shared, groups), update.A):
        raise ValueError(
            f"{name}: this update of a convolution with {groups} groups reads channels of other groups, so it is no "
            "update of the kernel and cannot be merged."
        )
    return update.with_rank(update.rank // groups, A=shared.clone(), groups=groups)


def _modules_to_save(config: dict[str, Any], trained: Mapping[str, Tensor]) -> tuple[str, ...]:
    """The modules in which the trained parameters lie, by full name: PEFT's config holds the ends of names."""
    modules = {".".join(name.split(".")[:depth]) for name in trained for depth in range(1, name.count(".") + 1)}
    return tuple(sorted({hit for end in config.get("modules_to_save") or () for hit in matching(end, modules)}))


def _targets(config: dict[str, Any]) -> tuple[str, ...]:
    targets = config.get("target_modules") or ()
    parameters = config.get("target_parameters") or ()
    return (targets, *parameters) if isinstance(targets, str) else tuple(sorted((*targets, *parameters)))
