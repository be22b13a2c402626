"""The settings of a run, each declared once.

From the fields of `TrainConfig` come the command line's flags, the keys of a YAML file, `lorakit init`'s commented
file, the help text and the config.yaml of an output folder. Flags beat the YAML file, and the file beats the defaults.

Nothing heavy is imported here: `lorakit --help` reads this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal


class UsageError(ValueError):
    """A command line or a configuration file that cannot be understood: exit code 2."""


def _setting(
    default: Any = MISSING, *, help: str, group: str, example: str = "", aliases: tuple[str, ...] = (), **limits: Any
) -> Any:
    """A field. Limits: above, at_least, below. aliases: other flags people type from habit."""
    metadata = {"help": help, "group": group, "example": example, "aliases": aliases, "limits": limits}
    if isinstance(default, tuple):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


_DATA, _ADAPTER, _TRAINING, _OUTPUT = "model and data", "adapter", "training", "output"


@dataclass(frozen=True)
class TrainConfig:
    """Everything that `lorakit train` takes."""

    model: str = _setting(
        help="base model: a folder, a .gguf file or a hub id",
        group=_DATA,
        example="path/to/model",
        aliases=("model-name-or-path",),
    )
    data: str = _setting(
        help="jsonl, json, csv, parquet or txt file; a folder with train|valid|test files; or a hub id",
        group=_DATA,
        example="data.jsonl",
        aliases=("dataset-name",),
    )
    output_dir: str = _setting(
        help="folder for the adapter and everything about it", group=_OUTPUT, example="out", aliases=("o",)
    )
    task: Literal["auto", "causal-lm", "classification"] = _setting(
        "auto", help="what to train; auto: told by the data", group=_DATA
    )
    system: str | None = _setting(None, help="system message put before conversations that have none", group=_DATA)
    plain: bool = _setting(False, help="do not wrap prompts in the model's chat template", group=_DATA)
    prompt_field: str | None = _setting(None, help="the data's key for the prompt", group=_DATA)
    completion_field: str | None = _setting(None, help="the data's key for the completion", group=_DATA)
    text_field: str | None = _setting(None, help="the data's key for the text (two, with a comma: a pair)", group=_DATA)
    label_field: str | None = _setting(None, help="the data's key for the label", group=_DATA)
    messages_field: str | None = _setting(None, help="the data's key for the messages", group=_DATA)
    max_seq_length: int = _setting(1024, help="longest row, in tokens", group=_DATA, at_least=2)
    too_long: Literal["drop", "truncate"] = _setting("drop", help="what to do with longer rows", group=_DATA)
    holdout: float = _setting(
        0.05,
        help="share of the training rows held out when the data has no other split",
        group=_DATA,
        at_least=0,
        below=1,
    )

    rank: int = _setting(16, help="r, the rank of the update", group=_ADAPTER, aliases=("lora-r",), at_least=1)
    alpha: float | None = _setting(
        None, help="numerator of the scale alpha/r (default: 2 r)", group=_ADAPTER, aliases=("lora-alpha",), above=0
    )
    dropout: float = _setting(
        0.0, help="dropout on the update's input", group=_ADAPTER, aliases=("lora-dropout",), at_least=0, below=1
    )
    targets: tuple[str, ...] = _setting(
        ("all-linear",),
        help="modules to adapt: all-linear, ends of names, globs; separated by commas",
        group=_ADAPTER,
        aliases=("target-modules",),
    )
    rslora: bool = _setting(False, help="scale alpha/sqrt(r)", group=_ADAPTER)
    dora: bool = _setting(False, help="learn the magnitude of each output row too", group=_ADAPTER)
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = _setting(
        "kaiming", help="how the factors begin", group=_ADAPTER
    )
    bias: Literal["none", "lora_only", "all"] = _setting("none", help="biases to train", group=_ADAPTER)
    also_train: tuple[str, ...] = _setting((), help="modules to train whole, separated by commas", group=_ADAPTER)

    epochs: float = _setting(3.0, help="passes over the data", group=_TRAINING, aliases=("num-train-epochs",), above=0)
    max_steps: int | None = _setting(None, help="stop after this many steps", group=_TRAINING, at_least=1)
    batch_size: int = _setting(
        8, help="rows a step, on each device", group=_TRAINING, aliases=("per-device-train-batch-size",), at_least=1
    )
    gradient_accumulation_steps: int = _setting(1, help="batches added up for a step", group=_TRAINING, at_least=1)
    learning_rate: float = _setting(2e-4, help="at its highest", group=_TRAINING, aliases=("lr",), above=0)
    scheduler: Literal["linear", "cosine", "constant"] = _setting(
        "linear", help="learning rate over time", group=_TRAINING
    )
    warmup_ratio: float = _setting(
        0.03, help="share of the steps in which it rises", group=_TRAINING, at_least=0, below=1
    )
    weight_decay: float = _setting(0.0, help="AdamW's", group=_TRAINING, at_least=0)
    gradient_checkpointing: bool = _setting(False, help="less memory, more time", group=_TRAINING)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _setting(
        "auto", help="of the base weights; auto: bfloat16 where the device is fast at it", group=_TRAINING
    )
    seed: int = _setting(0, help="of everything random", group=_TRAINING)

    eval_steps: int | None = _setting(
        None, help="steps between held-out losses (default: an epoch)", group=_OUTPUT, at_least=1
    )
    save_steps: int | None = _setting(
        None, help="steps between checkpoints (default: an epoch)", group=_OUTPUT, at_least=1
    )
    logging_steps: int = _setting(10, help="steps between lines of metrics.jsonl", group=_OUTPUT, at_least=1)
    eval_samples: int = _setting(100, help="held-out rows compared at the end", group=_OUTPUT, at_least=0)
    max_new_tokens: int | None = _setting(
        None, help="longest answer compared (default: 16 over the longest expected one)", group=_OUTPUT, at_least=1
    )
    report_to: str | None = _setting(None, help="tensorboard, wandb, … as transformers names them", group=_OUTPUT)
    resume: str | None = _setting(None, help="a checkpoint to go on from, or auto for the newest", group=_OUTPUT)
    overwrite: bool = _setting(False, help="replace what is in --output-dir", group=_OUTPUT)
    dry_run: bool = _setting(False, help="check and plan, then stop", group=_OUTPUT)


_FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_TYPES = typing.get_type_hints(TrainConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for each setting, in groups, and -c/--config."""
    parser.add_argument("-c", "--config", metavar="FILE", help="YAML file with settings; flags beat it")
    groups = {name: parser.add_argument_group(name) for name in (_DATA, _ADAPTER, _TRAINING, _OUTPUT)}
    for name, setting in _FIELDS.items():
        meta = setting.metadata
        flags = [f"--{_kebab(name)}", *(f"--{alias}" if len(alias) > 1 else f"-{alias}" for alias in meta["aliases"])]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": _help_with_default(name)}
        if _TYPES[name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = _metavar(name)
        groups[meta["group"]].add_argument(*flags, **options)


def from_args(args: argparse.Namespace) -> TrainConfig:
    """The settings of a parsed command line, its YAML file included. Raises UsageError listing what is wrong."""
    given = {name: value for name, value in vars(args).items() if name in _FIELDS}
    values: dict[str, Any] = {}
    problems: list[str] = []
    if args.config:
        _read_yaml(Path(args.config), values, problems, overridden=given)
    for name, value in given.items():
        values[name] = _convert(name, value, f"--{_kebab(name)}", problems)
    if problems:
        raise UsageError("\n".join(problems))
    missing = [name for name, f in _FIELDS.items() if _is_required(f) and name not in values]
    if missing:
        example = " ".join(f"--{_kebab(name)} {_FIELDS[name].metadata['example']}" for name in missing)
        raise UsageError(f"missing: {example}   (or give them in a YAML file: --config FILE)")
    return TrainConfig(**values)


def to_yaml(config: TrainConfig) -> str:
    """Every setting as YAML, in the order of the fields: what config.yaml holds."""
    import yaml

    values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(config).items()}
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def commented_yaml() -> str:
    """A file to start from: the required settings with examples, the others commented out with their defaults."""
    lines = ["# Settings of lorakit train. Run it: lorakit train --config THIS_FILE", ""]
    group = ""
    for name, setting in sorted(_FIELDS.items(), key=lambda item: not _is_required(item[1])):
        title = "required" if _is_required(setting) else setting.metadata["group"]
        if title != group:
            lines += [f"# --- {title} ---"] if not group else ["", f"# --- {title} ---"]
            group = title
        choices = typing.get_args(_TYPES[name]) if typing.get_origin(_TYPES[name]) is Literal else ()
        lines.append(f"# {setting.metadata['help']}" + (f" ({' | '.join(choices)})" if choices else ""))
        if _is_required(setting):
            lines.append(f"{name}: {setting.metadata['example']}")
        else:
            lines.append(f"# {name}: {_yaml_value(_default(setting))}")
    return "\n".join(lines) + "\n"


def warnings_for(config: TrainConfig) -> list[str]:
    """What is allowed but seldom meant."""
    if config.learning_rate < 2e-5:
        return [
            f"learning rate {config.learning_rate:g} is what full fine-tuning uses; LoRA's factors start at zero and "
            "need about ten times more: 1e-4 to 5e-4."
        ]
    if config.learning_rate > 5e-3:
        return [
            f"learning rate {config.learning_rate:g} is far above what LoRA stands (1e-4 to 1e-3); expect divergence."
        ]
    return []


def suggestion(word: str, known: typing.Iterable[str]) -> str:
    """Did you mean …?, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


# --- values --------------------------------------------------------------------------------------------------------


def _convert(name: str, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the type of the field; what is wrong with it is added to `problems`, with `where` it stands."""
    wanted = _TYPES[name]
    try:
        converted = _as_type(value, wanted)
    except ValueError:
        problems.append(f"{where}: expected {_describe(wanted)}, found {value!r}.{_choice_hint(value, wanted)}")
        return None
    problem = _outside(converted, _FIELDS[name].metadata["limits"])
    if problem:
        problems.append(f"{where}: expected {problem}, found {value!r}.")
    return converted


def _as_type(value: Any, wanted: Any) -> Any:
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _as_type(value, next(option for option in options if option is not type(None)))
    if origin is Literal:
        if value not in options:
            raise ValueError
        return value
    if origin is tuple:
        parts = value.split(",") if isinstance(value, str) else value
        if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
            raise ValueError
        return tuple(part.strip() for part in parts if part.strip())
    if wanted is bool:
        if not isinstance(value, bool):
            raise ValueError
        return value
    if isinstance(value, bool) or value is None or isinstance(value, list | dict):
        raise ValueError
    if wanted is str:
        return str(value)
    number = float(value)  # PyYAML reads 2e-4 as text
    if wanted is int:
        if not number.is_integer():
            raise ValueError
        return int(number)
    if number != number:
        raise ValueError
    return number


def _outside(value: Any, limits: Mapping[str, float]) -> str | None:
    if value is None:
        return None
    if "above" in limits and not value > limits["above"]:
        return f"more than {limits['above']:g}"
    if "at_least" in limits and not value >= limits["at_least"]:
        return f"at least {limits['at_least']:g}"
    if "below" in limits and not value < limits["below"]:
        return f"less than {limits['below']:g}"
    return None


def _describe(wanted: Any) -> str:
    origin, options = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (types.UnionType, typing.Union):
        return _describe(next(option for option in options if option is not type(None)))
    if origin is Literal:
        return "one of " + ", ".join(options)
    if origin is tuple:
        return "names separated by commas"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]


def _choice_hint(value: Any, wanted: Any) -> str:
    return suggestion(str(value), typing.get_args(wanted)) if typing.get_origin(wanted) is Literal else ""


# --- YAML ----------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, values: dict[str, Any], problems: list[str], overridden: Mapping[str, Any]) -> None:
    """Settings from a flat file into `values`; everything wrong with it, with its line, into `problems`."""
    import yaml

    if not path.is_file():
        near = suggestion(path.name, (entry.name for entry in path.parent.iterdir()) if path.parent.is_dir() else ())
        raise UsageError(f"--config {path}: no such file.{near}")
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}:{line}: not YAML: {error.problem}.") from None
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:1: expected lines of the form `key: value`.")
    constructor = yaml.SafeLoader("")
    lines: dict[str, int] = {}
    for key_node, value_node in root.value:
        name = str(key_node.value).replace("-", "_")
        line = key_node.start_mark.line + 1
        if name not in _FIELDS:
            nested = isinstance(value_node, yaml.MappingNode)
            hint = " The file is flat, without sections." if nested else suggestion(name, _FIELDS)
            problems.append(f"{path}:{line}: unknown key {key_node.value!r}.{hint}")
        elif name in lines:
            problems.append(f"{path}:{line}: {name!r} stands here and in line {lines[name]}.")
        else:
            lines[name] = line
            value = constructor.construct_object(value_node, deep=True)
            if name not in overridden:
                values[name] = _convert(name, value, f"{path}:{line}: {name}", problems)


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "[" + ", ".join(value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- flags ---------------------------------------------------------------------------------------------------------


def _kebab(name: str) -> str:
    return name.replace("_", "-")


def _metavar(name: str) -> str:
    wanted = _TYPES[name]
    if typing.get_origin(wanted) is Literal:
        return "|".join(typing.get_args(wanted))
    return {"a whole number": "N", "a number": "X", "names separated by commas": "NAMES"}.get(_describe(wanted), "TEXT")


def _help_with_default(name: str) -> str:
    setting = _FIELDS[name]
    text = str(setting.metadata["help"]).replace("%", "%%")
    default = _default(setting)
    if _is_required(setting) or default in (None, False, ()):
        return text
    shown = (
        ",".join(default) if isinstance(default, tuple) else f"{default:g}" if isinstance(default, float) else default
    )
    return f"{text} (default: {shown})"


def _is_required(setting: Any) -> bool:
    return setting.default is MISSING and setting.default_factory is MISSING


def _default(setting: Any) -> Any:
    return setting.default_factory() if setting.default_factory is not MISSING else setting.default
