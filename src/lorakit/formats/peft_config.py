"""PEFT's `adapter_config.json`: what each of its fields says about the adapter, and what lorakit does with it.

Every field of PEFT's LoraConfig is listed in `FIELDS`. Some are honoured. Some change nothing in a finished adapter.
The others make the adapter compute something that lorakit does not, so they are refused by name unless their value is
neutral. A field that is not in the table may change what the adapter computes, so it is refused unless its value is
null, false or empty.

Names and types are checked here, so that no other module needs to look into the file.
"""

from __future__ import annotations

import functools
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from ..core.errors import LoraError
from ..core.reading import json_of
from ..core.trainable import BIASES, Bias
from .foreign import contents

CONFIG = "adapter_config.json"
Verdict = Literal["honoured", "no effect", "refused"]
Number = TypeVar("Number", int, float)
Residual = Literal["", "pissa", "olora"]


@dataclass(frozen=True)
class Rule:
    """What is done with a field. "refused" is for values that are neither neutral nor null, false or empty."""

    verdict: Verdict
    says: str  # for refused fields what the field does to the adapter, for others its meaning
    neutral: tuple[Any, ...] = ()


FIELDS: Mapping[str, Rule] = {
    "peft_type": Rule("honoured", "LORA; other types are refused"),
    "r": Rule("honoured", "the rank; must be there"),
    "lora_alpha": Rule("honoured", "α; must be there"),
    "lora_dropout": Rule("honoured", "dropout of the update's input in training"),
    "rank_pattern": Rule("honoured", "ranks by regular expression on the end of a name"),
    "alpha_pattern": Rule("honoured", "α by regular expression on the end of a name"),
    "use_rslora": Rule("honoured", "scale α/√r instead of α/r"),
    "use_dora": Rule("honoured", "magnitudes; must agree with the tensors"),
    "fan_in_fan_out": Rule("honoured", "the weight is stored as (in, out); the model decides"),
    "bias": Rule("honoured", "which biases were trained"),
    "modules_to_save": Rule("honoured", "the modules trained whole, by the ends of their names as PEFT compares them"),
    "target_modules": Rule("honoured", "named in reports; the tensors say which modules are adapted"),
    "target_parameters": Rule("honoured", "which parameters the experts' tensors belong to"),
    "trainable_token_indices": Rule(
        "honoured", "the tokens whose rows of the embedding, or of other tables, are trained"
    ),
    "init_lora_weights": Rule(
        "honoured",
        "true, false, gaussian, eva, orthogonal, mica: where A and B began. pissa, olora: the update counts from W "
        "less a part of it, which is computed from the base model. Others are refused",
    ),
    "base_model_name_or_path": Rule("honoured", "the base model"),
    "task_type": Rule("honoured", "what the model does"),
    "peft_version": Rule("honoured", "tells the layout of experts"),
    "inference_mode": Rule("no effect", "whether PEFT freezes the factors"),
    "auto_mapping": Rule("no effect", "the class of the base model"),
    "revision": Rule("no effect", "the revision of the base model on the hub"),
    "runtime_config": Rule("no effect", "how PEFT computes"),
    "exclude_modules": Rule("no effect", "the tensors say which modules are adapted"),
    "layers_to_transform": Rule("no effect", "the tensors say which modules are adapted"),
    "layers_pattern": Rule("no effect", "the tensors say which modules are adapted"),
    "eva_config": Rule("no effect", "where A began"),
    "corda_config": Rule("no effect", "see init_lora_weights"),
    "loftq_config": Rule("no effect", "see init_lora_weights"),
    "lora_ga_config": Rule("no effect", "see init_lora_weights"),
    "velora_config": Rule("no effect", "how PEFT computes the gradient of A"),
    "qalora_group_size": Rule("no effect", "see use_qalora"),
    "megatron_core": Rule("no effect", "see megatron_config"),
    "ensure_weight_tying": Rule("no effect", "the tensors of both of two tied modules are in the file"),
    "merge_weights": Rule("no effect", "of PEFT before 0.3: when it merged"),
    "alora_invocation_tokens": Rule("refused", "the update acts after these tokens only (aLoRA)"),
    "use_qalora": Rule("refused", "A reads pooled inputs (QA-LoRA)"),
    "lora_bias": Rule("refused", "B has a bias of its own"),
    "arrow_config": Rule("refused", "a router mixes several adapters (Arrow)"),
    "layer_replication": Rule("refused", "the base model's layers are used several times"),
    "megatron_config": Rule("refused", "the factors belong to Megatron's parallel layers"),
    "use_bdlora": Rule("refused", "A or B is block-diagonal and stored as its blocks (BD-LoRA)"),
    "monteclora_config": Rule("refused", "the factors are drawn at random (MonteCLoRA)"),
    "kasa_config": Rule("refused", "the base weight is truncated and the update has a diagonal (KaSA)"),
    "enable_lora": Rule("refused", "of PEFT before 0.3: blocks of a fused projection"),
}
_INITS_AT_THE_BASE = ("gaussian", "eva", "orthogonal", "mica")  # they leave the base weight as it is
_CONVERT = (
    "Convert it with PEFT: save the adapter before training, and after it call "
    "save_pretrained(folder, path_initial_model_for_weight_conversion=…)."
)


@dataclass(frozen=True)
class PeftConfig:
    """The fields that are honoured, after all checks."""

    path: Path
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: Bias = "none"
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str = ()
    target_parameters: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # "" for every table in the file
    residual: Residual = ""  # the update is added to W − s·B₀A₀, with the B₀ and A₀ of this init
    base_model: str | None = None
    task_type: str | None = None
    peft_version: str | None = None
    by_peft: bool = False  # PEFT itself wrote it: all of its fields are there

    def rank_of(self, name: str) -> int:
        """The rank of the module of this name. Patterns are applied as PEFT applies them."""
        return first_match(self.rank_pattern, name, self.r)

    def alpha_of(self, name: str) -> float:
        """α of the module of this name."""
        return first_match(self.alpha_pattern, name, self.lora_alpha)

    def tokens_of(self, name: str) -> tuple[int, ...]:
        """The trained tokens of this table, in the file's order. PEFT compares the ends of names as texts."""
        return next((tokens for end, tokens in self.token_indices.items() if name.endswith(end)), ())


def read_config(folder: str | Path) -> PeftConfig:
    """The configuration in an adapter's folder.

    Raises FileNotFoundError, or LoraError that names the file and the field: for a value of another type or out of
    range, and for a field that makes the adapter compute something that lorakit does not.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG}.{contents(Path(folder))}")
    return checked(path, json_of(path, dict))


def checked(path: Path, fields: Mapping[str, Any]) -> PeftConfig:
    """The configuration in these fields, as JSON has them. path: what errors name. Raises what `read_config` does."""
    values = _Values(path, fields)
    _check_type(values)
    for name, value in values.fields.items():
        rule = FIELDS.get(name)
        if _says_nothing(name, value) or (rule is not None and (rule.verdict != "refused" or value in rule.neutral)):
            continue
        shown = _short(value)
        if rule is None:
            raise LoraError(
                f"{path}: {name}={shown} is a field that this version of lorakit does not know: it may change what the "
                f"adapter computes. Set it to null if it does not."
            )
        raise LoraError(f"{path}: {name}={shown} is not supported: {rule.says}.")
    return PeftConfig(
        path=path,
        r=values.rank("r", values.required("r")),
        lora_alpha=values.alpha("lora_alpha", values.required("lora_alpha")),
        lora_dropout=values.probability("lora_dropout"),
        rank_pattern=values.patterns("rank_pattern", values.rank),
        alpha_pattern=values.patterns("alpha_pattern", values.alpha),
        use_rslora=values.flag("use_rslora"),
        use_dora=values.flag("use_dora"),
        fan_in_fan_out=values.flag("fan_in_fan_out"),
        bias=cast(Bias, values.choice("bias", BIASES, "none")),
        modules_to_save=values.names("modules_to_save"),
        target_modules=values.targets("target_modules"),
        target_parameters=values.names("target_parameters"),
        token_indices=values.tokens("trainable_token_indices"),
        residual=_residual(values),
        base_model=values.text("base_model_name_or_path"),
        task_type=values.text("task_type"),
        peft_version=values.text("peft_version"),
        by_peft="auto_mapping" in values.fields,
    )


@dataclass(frozen=True)
class _Values:
    """The fields of a file, each read with a check of its type. null means the default of an optional field."""

    path: Path
    fields: Mapping[str, Any]

    def wrong(self, name: str, value: Any, expected: str) -> LoraError:
        return LoraError(f"{self.path}: {name} is {_short(value)}, expected {expected}.")

    def required(self, name: str) -> Any:
        if name not in self.fields:
            raise LoraError(f"{self.path}: {name} is missing.")
        return self.fields[name]

    def rank(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.wrong(name, value, "a whole number of at least 1")
        return value

    def alpha(self, name: str, value: Any) -> float:
        expected = "a number other than 0"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, expected)
        try:
            number = float(value)
        except OverflowError:
            raise self.wrong(name, value, expected) from None
        if not math.isfinite(number) or number == 0:
            raise self.wrong(name, value, expected)
        return number

    def probability(self, name: str) -> float:
        value = self.fields.get(name)
        if value is None:
            return 0.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
            raise self.wrong(name, value, "a probability in [0, 1)")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.fields.get(name)
        if not isinstance(value, bool | None):
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if not isinstance(value, str | None):
            raise self.wrong(name, value, "a text")
        return value or None

    def choice(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value = self.fields.get(name)
        if value is None:
            return default
        if value not in choices:
            raise self.wrong(name, value, f"one of {', '.join(map(repr, choices))}")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self.fields.get(name)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
            raise self.wrong(name, value, "a list of names")
        return tuple(value)

    def targets(self, name: str) -> tuple[str, ...] | str:
        value = self.fields.get(name)
        return value if isinstance(value, str) else self.names(name)

    def tokens(self, name: str) -> dict[str, tuple[int, ...]]:
        """Tokens by the name of their table; a list, which names none, under the empty name."""
        value = self.fields.get(name)
        by_table = value if isinstance(value, dict) else {} if value is None else {"": value}
        for own in by_table.values():
            if not isinstance(own, list) or any(type(token) is not int or token < 0 for token in own):
                raise self.wrong(name, value, "a list of tokens, or an object of such lists by module")
            if len(set(own)) < len(own):
                raise self.wrong(name, value, "each token once")
        return {table: tuple(own) for table, own in by_table.items() if own}

    def patterns(self, name: str, read: Any) -> dict[str, Any]:
        value = self.fields.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object of values by pattern")
        for pattern in value:
            try:
                _compiled(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise LoraError(f"{self.path}: {name}: {pattern!r} is not a regular expression: {error}.") from None
        return {pattern: read(f"{name}[{pattern!r}]", own) for pattern, own in value.items()}


def _check_type(values: _Values) -> None:
    kind = values.fields.get("peft_type")
    if isinstance(kind, str) and kind.upper() == "LORA":
        return
    if "fine_tune_type" in values.fields or "lora_parameters" in values.fields:
        raise LoraError(
            f"{values.path} is of an adapter in mlx-lm's format, which lorakit does not read: "
            "its folder holds adapters.safetensors with lora_a and lora_b."
        )
    raise LoraError(f"{values.path}: peft_type is {_short(kind)}; lorakit reads LORA adapters.")


def _residual(values: _Values) -> Residual:
    """What `init_lora_weights` says about the weight to which the update is added."""
    init = values.fields.get("init_lora_weights")
    if init is None or isinstance(init, bool):
        return ""
    if not isinstance(init, str):
        raise values.wrong("init_lora_weights", init, "true, false or a text")
    if init.lower() in (*_INITS_AT_THE_BASE, "true", "false"):
        return ""
    if init.lower() in get_args(Residual):
        return cast(Residual, init.lower())
    if re.fullmatch(r"pissa_niter_\d+|corda|loftq|lora_ga", init.lower()):
        raise LoraError(
            f"{values.path}: init_lora_weights={init!r} is not supported: the adapter belongs to a base model that was "
            f"changed before training, and the change cannot be computed from the folder. {_CONVERT}"
        )
    raise LoraError(
        f"{values.path}: init_lora_weights={init!r} is not known: it may count from a changed base model. {_CONVERT}"
    )


def first_match(patterns: Mapping[str, Number], name: str, default: Number) -> Number:
    """The value of the first pattern that matches the end of `name`, as PEFT matches them, or `default`."""
    return next((value for pattern, value in patterns.items() if _compiled(pattern).match(name)), default)


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about patterns that a later Python reads in another way
        return re.compile(rf"(.*\.)?({pattern})$")


def _says_nothing(name: str, value: Any) -> bool:
    if value == {}:
        return not name.endswith("_config")  # PEFT makes a configuration with defaults of an empty one
    return value is None or value is False or value in ("", [])


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
