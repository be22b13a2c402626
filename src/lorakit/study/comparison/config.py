"""The settings of `lorakit compare`, and the resulting settings of each method on each task.

A YAML file may hold `tasks:`, a mapping of names to settings, and `methods:`, a list. Both may override settings at the
top of the file:

    model: path/to/model
    epochs: 3                                   for every task and method
    tasks:
      reviews: {data: reviews.jsonl}
      news: {data: news.jsonl, epochs: 1}       another number here
    methods:
      - full
      - lora rank=4
      - {method: lora rank=64, learning_rate: 1e-4}

The innermost setting wins: method, then task, then top. A flag of the command line overrides all of them. Nothing heavy
is imported here.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...training.config import QUANTIZE, Quantize
from ...training.settings import UsageError, check_settings, from_args, read_mapping, setting
from ...training.yaml_files import Yaml, line_of, value_of

if TYPE_CHECKING:
    from ..methods.baselines import Method

_MODEL, _METHODS, _DATA, _TRAINING, _SEARCH = "model and output", "methods", "data", "training", "search"


def _methods(value: str | Yaml, where: str, problems: list[str]) -> tuple[str | dict[str, Any], ...]:
    """Methods separated by commas, or a list in a file. They are checked, and returned as written."""
    import yaml

    items: list[tuple[Any, str]] = []
    if isinstance(value, Yaml) and not isinstance(value.node, yaml.ScalarNode):
        nodes = value.node.value if isinstance(value.node, yaml.SequenceNode) else [value.node]
        for node in nodes:
            own = Yaml(value.path, node)
            has_settings = isinstance(node, yaml.MappingNode)
            items.append((_method_item(own, problems) if has_settings else value_of(node, where, problems), own.place))
    else:
        text = value.node.value if isinstance(value, Yaml) else value
        items = [(word.strip(), where) for word in text.split(",") if word.strip()]
    for item, place in items:
        _check_method(item["method"] if isinstance(item, dict) else item, place, problems)
    if not items:
        problems.append(f"{where}: names no method.")
    return tuple(item for item, _ in items)


def _method_item(source: Yaml, problems: list[str]) -> dict[str, Any]:
    """A mapping with `method` and settings of training."""
    import yaml

    rest = [(key, value) for key, value in source.node.value if key.value != "method"]
    names = [value for key, value in source.node.value if key.value == "method"]
    if len(names) != 1:
        problems.append(f"{source.place}: expected one key `method` that names it.")
        return {"method": "full"}
    mapping = yaml.MappingNode(source.node.tag, rest, source.node.start_mark, source.node.end_mark)
    settings = read_mapping(CompareConfig, Yaml(source.path, mapping), problems, groups=(_TRAINING,))
    return {"method": value_of(names[0], source.place, problems), **settings}


def _check_method(text: Any, where: str, problems: list[str]) -> None:
    from ..methods.naming import method_of

    try:
        method_of(str(text))
    except ValueError as error:
        problems.append(f"{where}: {error}")


def _tasks(value: str | Yaml, where: str, problems: list[str]) -> dict[str, dict[str, Any]]:
    import yaml

    assert isinstance(value, Yaml)  # a setting without a flag
    if not isinstance(value.node, yaml.MappingNode):
        problems.append(f"{where}: expected names of tasks, each with its settings.")
        return {}
    tasks: dict[str, dict[str, Any]] = {}
    lines: dict[str, int] = {}
    for key, settings in value.node.value:
        name, line = str(value_of(key, where, problems)), line_of(key)
        if name in tasks:
            problems.append(f"{value.path}:{line}: the task {name!r} stands here and in line {lines[name]}.")
        lines[name] = line
        tasks[name] = read_mapping(
            CompareConfig, Yaml(value.path, settings), problems, groups=(_DATA, _METHODS, _TRAINING)
        )
    return tasks


def _published(value: str | Yaml, where: str, problems: list[str]) -> dict[str, Any]:
    """Published scores of a task, by label: a number for its first metric, or a number for each metric."""
    assert isinstance(value, Yaml)
    found = value_of(value.node, where, problems)

    def is_number(score: Any) -> bool:
        return isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)

    if not isinstance(found, dict) or not all(
        is_number(score) or (isinstance(score, dict) and all(map(is_number, score.values())))
        for score in found.values()
    ):
        problems.append(f"{where}: expected labels, each with a number or with numbers by metric.")
        return {}
    return {str(label): score for label, score in found.items()}


@dataclass(frozen=True)
class CompareConfig:
    """Everything that `lorakit compare` takes."""

    model: str = setting(
        help="base model: a folder, a .gguf file or a hub id",
        group=_MODEL,
        example="path/to/model",
        aliases=("model-name-or-path",),
        path=True,
    )
    output_dir: str = setting(
        help="folder for the runs, the tables and the page; its finished runs are kept",
        group=_MODEL,
        example="out",
        aliases=("o",),
        path=True,
    )
    tasks: dict[str, dict[str, Any]] = setting(
        help="several tasks by name, each with the settings in which it differs",
        group=_MODEL,
        parse=_tasks,
        file_only=True,
        factory=dict,
    )
    methods: tuple[str | dict[str, Any], ...] = setting(
        ("full", "bitfit", "adapter-h", "prefix-layer", "lora"),
        help='methods to compare, with optional settings: "full,lora rank=4,lora rank=64 targets=q_proj+v_proj"',
        group=_METHODS,
        parse=_methods,
    )

    seeds: int = setting(3, help="number of seeds: 0, 1, …", group=_SEARCH, at_least=1, at_most=1000)
    trials: int = setting(
        4,
        help="learning rates that each method may try on each task, with seed 0",
        group=_SEARCH,
        at_least=1,
        at_most=1000,
    )
    one_pass: bool = setting(
        False,
        help="train several runs of LoRA at once, for language models: less time on a GPU; their own time and memory "
        "are then unknown",
        group=_SEARCH,
    )
    so_far: bool = setting(False, help="show the tables of the finished runs, without starting others", group=_SEARCH)
    dry_run: bool = setting(False, help="show what would be run, without running it", group=_SEARCH)
    ignore_memory: bool = setting(
        False, help="start even if a method needs more memory than the machine has", group=_SEARCH
    )

    data: str | None = setting(
        None,
        help="jsonl, json, csv, parquet or txt file; a folder with train|valid|test files; or a hub id",
        group=_DATA,
        aliases=("dataset-name",),
        path=True,
    )
    subset: str | None = setting(None, help="configuration of a hub data set", group=_DATA)
    revision: str | None = setting(None, help="revision of a hub data set", group=_DATA)
    train_split: str | None = setting(None, help="a hub data set's split to train on", group=_DATA)
    valid_split: str | None = setting(None, help="a hub data set's split to choose the learning rate on", group=_DATA)
    test_split: str | None = setting(None, help="a hub data set's split to report the scores of", group=_DATA)
    task: Literal["auto", "causal-lm", "classification", "regression"] = setting(
        "auto", help="kind of task; auto: chosen by the data", group=_DATA
    )
    system: str | None = setting(None, help="system message put before conversations that have none", group=_DATA)
    plain: bool = setting(False, help="do not wrap prompts in the model's chat template", group=_DATA)
    template: str = setting("{prompt}", help="text around each prompt", group=_DATA, example="{prompt}\\n")
    prompt_field: str | None = setting(None, help="the data's key for the prompt", group=_DATA)
    completion_field: str | None = setting(None, help="the data's key for the completion", group=_DATA)
    references_field: str | None = setting(None, help="the data's key for a list of right answers", group=_DATA)
    text_field: str | None = setting(None, help="the data's key for the text (two, with a comma: a pair)", group=_DATA)
    label_field: str | None = setting(None, help="the data's key for the label", group=_DATA)
    messages_field: str | None = setting(None, help="the data's key for the messages", group=_DATA)
    max_seq_length: int = setting(512, help="longest row in tokens; longer rows are cut", group=_DATA, at_least=2)
    train_rows: int | None = setting(None, help="most train rows to use, drawn once", group=_DATA, at_least=1)
    valid_rows: int | None = setting(500, help="most validation rows to use, drawn once", group=_DATA, at_least=1)
    test_rows: int | None = setting(None, help="most test questions to use, drawn once", group=_DATA, at_least=1)
    metrics: tuple[str, ...] = setting(
        (), help="metrics to report, separated by commas; plots show the first (default: by the data)", group=_DATA
    )
    max_new_tokens: int | None = setting(
        None, help="longest answer in tokens (default: 16 more than the longest expected one)", group=_DATA, at_least=1
    )
    beams: int = setting(1, help="beams of the search for an answer; 1: greedy", group=_DATA, at_least=1)
    length_penalty: float = setting(
        1.0, help="exponent of the length in beam search", group=_DATA, at_least=-10, at_most=10
    )
    no_repeat_ngram: int = setting(
        0, help="length of token sequences that may not repeat; 0: all may", group=_DATA, at_least=0
    )
    dtype: Literal["auto", "float32"] = setting(
        "auto",
        help="dtype of the products; auto: bfloat16 if the device is fast at it. Weights are float32",
        group=_DATA,  # the same for every method of a task
    )
    quantize: Quantize = setting("none", help=QUANTIZE, group=_DATA)
    published: dict[str, Any] = setting(
        help="published scores to show beside, by label",
        group=_DATA,
        parse=_published,
        file_only=True,
        factory=dict,
    )

    epochs: float = setting(
        3.0, help="passes over the data", group=_TRAINING, aliases=("num-train-epochs",), above=0, at_most=1e6
    )
    max_steps: int | None = setting(None, help="stop after this many steps", group=_TRAINING, at_least=1)
    batch_size: int = setting(
        16, help="rows per step", group=_TRAINING, aliases=("per-device-train-batch-size",), at_least=1
    )
    gradient_accumulation_steps: int = setting(
        1, help="batches whose gradients are added for one step", group=_TRAINING, at_least=1
    )
    learning_rate: float | None = setting(
        None, help="peak learning rate (default: searched)", group=_TRAINING, aliases=("lr",), above=0, at_most=1e30
    )
    scheduler: Literal["linear", "cosine", "constant"] = setting(
        "linear", help="how the learning rate falls after its peak", group=_TRAINING
    )
    warmup_ratio: float = setting(
        0.06,
        help="share of the steps in which the learning rate rises to its peak",
        group=_TRAINING,
        at_least=0,
        below=1,
    )
    warmup_steps: int | None = setting(
        None, help="steps in which the learning rate rises, in place of a share", group=_TRAINING, at_least=0
    )
    weight_decay: float = setting(0.0, help="weight decay of AdamW", group=_TRAINING, at_least=0, at_most=1000)
    label_smoothing: float = setting(
        0.0,
        help="label smoothing: share of the probability spread over all classes or tokens",
        group=_TRAINING,
        at_least=0,
        below=1,
    )
    gradient_checkpointing: bool = setting(
        False, help="recompute activations in the backward pass: less memory, more time", group=_TRAINING
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class MethodConfig:
    """A method, and how it is trained on a task."""

    method: Method
    training: CompareConfig


@dataclass(frozen=True)
class TaskConfig:
    """A task: its name, its settings, and the methods compared on it."""

    name: str
    data: CompareConfig
    methods: tuple[MethodConfig, ...]


def config_of(args: argparse.Namespace) -> CompareConfig:
    """The settings of a parsed command line and its file. Raises UsageError listing what is wrong."""
    return _overruled(from_args(CompareConfig, args), vars(args))


def _overruled(config: CompareConfig, flags: Collection[str]) -> CompareConfig:
    """Remove the settings named by flags from every task and method, because flags override the whole file."""

    def rest(settings: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in settings.items() if name not in flags}

    def items(methods: tuple[str | dict[str, Any], ...]) -> tuple[str | dict[str, Any], ...]:
        return tuple(item if isinstance(item, str) else rest(item) for item in methods)

    tasks = {name: rest(settings) for name, settings in config.tasks.items()}
    for settings in tasks.values():
        if "methods" in settings:
            settings["methods"] = items(settings["methods"])
    return dataclasses.replace(config, tasks=tasks, methods=items(config.methods))


def tasks_of(config: CompareConfig) -> tuple[TaskConfig, ...]:
    """Every task with its methods.

    Raises UsageError if there is no data, if a template lacks {prompt}, or if two methods are the same.
    """
    from pathlib import Path

    named = config.tasks or ({Path(config.data).resolve().stem: {}} if config.data else {})
    if not named:
        raise UsageError("missing: --data data.jsonl   (or tasks: in a YAML file)")
    tasks = []
    for name, settings in named.items():
        own = dataclasses.replace(config, **settings)
        if own.data is None:
            raise UsageError(f"task {name}: data is missing.")
        if "{prompt}" not in own.template:
            raise UsageError(f"task {name}: template: {own.template!r} has no {{prompt}} in it.")
        tasks.append(TaskConfig(name, own, tuple(_resolved(own))))
    return tuple(tasks)


def _resolved(task: CompareConfig) -> list[MethodConfig]:
    from ..methods.naming import method_of, name_of

    found: dict[str, MethodConfig] = {}
    for item in task.methods:
        settings = dict(item) if isinstance(item, dict) else {"method": item}
        method = method_of(settings.pop("method"))
        name = name_of(method)
        if name in found:
            raise UsageError(f"methods: {name!r} is named twice.")
        found[name] = MethodConfig(method, dataclasses.replace(task, **settings))
    return list(found.values())
