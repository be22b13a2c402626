"""PEFT's `LoraConfig` as lorakit's settings, with PEFT's own words for which modules are meant.

PEFT takes a list of targets as whole names or ends of names, and a text as a regular expression over whole names. Ranks
and alphas are chosen by regular expressions over ends. So the modules are chosen here, by PEFT's own function, and
`LoRASettings` gets their full names. A field that makes the adapter compute something that lorakit does not is refused,
as in a file (`formats/peft_config.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL_TARGETS
from torch import nn

from ..core.errors import LoraError
from ..core.names import named_modules
from ..core.parameters import AdaptedParameter
from ..core.settings import LoRASettings
from ..core.targets import ALL_LINEAR, matching, select
from ..formats.peft_config import checked

_INITS = {"true": "kaiming", "false": "kaiming", "gaussian": "gaussian", "pissa": "pissa", "olora": "olora"}
_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}
# They change how a new adapter begins or learns, so a finished one may have them and a new one may not.
_OF_NEW_ONES = {
    "velora_config": "the gradient of A is computed from compressed inputs (VeLoRA)",
    "ensure_weight_tying": "the updates of tied modules are tied",
}


def settings_of(config: LoraConfig, model: nn.Module) -> LoRASettings:
    """The settings that adapt `model`, now without an adapter, as PEFT would by `config`.

    Completes the configuration as PEFT does: the usual targets of the model's architecture, its head among
    `modules_to_save`. Raises LoraError for what lorakit does not compute, and for names that match nothing.
    """
    _complete(config, model)
    fields = checked(Path(type(config).__name__), _plain_fields(config))
    for name, says in _OF_NEW_ONES.items():
        if getattr(config, name, None):
            raise LoraError(f"LoraConfig: {name}={getattr(config, name)!r} is not supported: {says}. Leave it out.")
    if getattr(config, "_custom_modules", None):
        raise LoraError("LoraConfig has layer classes of its own: register yours with lorakit.adapts instead.")
    modules = {name: module for name, module in named_modules(model) if not isinstance(module, AdaptedParameter)}
    whole = _whole(config, modules)
    targets = [name for name in _targets(config, model, modules) if not _inside(name, whole)]
    targets += [name for end in config.target_parameters or () for name in _parameters(end, modules)]
    if not targets:
        raise LoraError(
            f"LoraConfig: target_modules={config.target_modules!r} and "
            f"target_parameters={config.target_parameters!r} match nothing in {type(model).__name__}."
        )
    ranks = {name: rank for name in targets if (rank := fields.rank_of(name)) != fields.r}
    alphas = {name: alpha for name in targets if (alpha := fields.alpha_of(name)) != fields.lora_alpha}
    return LoRASettings(
        targets=targets,
        rank=fields.r,
        alpha=fields.lora_alpha,
        dropout=fields.lora_dropout,
        rslora=fields.use_rslora,
        dora=fields.use_dora,
        init=_init(config),
        rank_pattern=ranks,
        alpha_pattern=alphas,
        bias=fields.bias,
        also_train=whole,
        trainable_tokens=config.trainable_token_indices or {},
    )


def lora_config(fields: dict[str, Any]) -> LoraConfig:
    """PEFT's configuration with the fields of a file of lorakit's."""
    return LoraConfig(
        **{name: value for name, value in fields.items() if name != "peft_type"} | {"inference_mode": False}
    )


def begins_at_random(config: LoraConfig) -> bool:
    """Whether both A and B are to be drawn: PEFT's init for tests, with which a new adapter does something."""
    return config.init_lora_weights is False


def _plain_fields(config: LoraConfig) -> dict[str, Any]:
    """The fields as a file would have them. The init is checked apart, because here it says how to begin."""
    fields: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=list))
    return fields | {"init_lora_weights": True}


def _init(config: LoraConfig) -> str:
    given = str(config.init_lora_weights).lower()
    name = "pissa" if re.fullmatch(r"pissa_niter_\d+", given) else given
    if name not in _INITS:
        raise LoraError(
            f"LoraConfig: init_lora_weights={config.init_lora_weights!r} is unknown: expected True, False, 'gaussian', "
            "'pissa' or 'olora'. For others use lorakit.add_init and lorakit.attach, and then lorakit.peft_view."
        )
    return _INITS[name]


def _complete(config: LoraConfig, model: nn.Module) -> None:
    """Fill in what PEFT fills in by the model's architecture and task."""
    architecture = getattr(getattr(model, "config", None), "model_type", None)
    if config.target_modules is None and not config.target_parameters:
        usual = USUAL_TARGETS.get(architecture)
        if usual is None:
            raise LoraError(f"LoraConfig: name target_modules. {type(model).__name__} has no usual ones.")
        config.target_modules = usual if isinstance(usual, str) else set(usual)
    heads = _HEADS.get(config.task_type, ())
    if heads:
        config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))


def _targets(config: LoraConfig, model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    if config.target_modules is None:
        return []
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        exclude = config.exclude_modules or ()
        return [
            name
            for name in select(model, ALL_LINEAR).targets
            if not (re.fullmatch(exclude, name) if isinstance(exclude, str) else _matches_any(exclude, name))
        ]
    return [name for name in modules if name and check_target_module_exists(config, name)]


def _matches_any(ends: Iterable[str], name: str) -> bool:
    """Whether one of these is the name, or its end."""
    return any(matching(end, [name]) for end in ends)


def _whole(config: LoraConfig, modules: dict[str, nn.Module]) -> list[str]:
    """The modules to train whole: those whose names end so, without those inside others."""
    found: list[str] = []
    heads = _HEADS.get(config.task_type, ())
    for end in config.modules_to_save or ():
        hits = [
            name for name, module in modules.items() if name.endswith(end) and any(True for _ in module.parameters())
        ]
        if not hits and end not in heads:
            raise LoraError(f"LoraConfig: modules_to_save={end!r} matches no module with parameters.")
        found += [name for name in hits if not _inside(name, found)]
    return list(dict.fromkeys(found))


def _inside(name: str, modules: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def _parameters(end: str, modules: dict[str, nn.Module]) -> list[str]:
    """The parameters whose names end so. A layer's own weight is named by the layer."""
    names = [
        f"{prefix}.{local}".removeprefix(".")
        for prefix, module in modules.items()
        for local in module._parameters
        if _matches_any([end], f"{prefix}.{local}".removeprefix("."))
    ]
    layers = nn.Linear | nn.Embedding | nn.modules.conv._ConvNd
    return [
        owner if local == "weight" and isinstance(modules[owner], layers) else name
        for name in names
        for owner, _, local in [name.rpartition(".")]
    ]
