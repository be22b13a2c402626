"""The model card: README.md of an output folder, and of a repository at the hub.

It names no place of the machine that trained: of a path only the last name, or the hub's name of a model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..core.numbers import duration
from ..core.table import Table
from .config import TrainConfig
from .report import Evaluation, Sample, metrics_table, one_line, telling
from .tried import Tried
from .values import value_text

_PATHS = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata["path"]}
_LEFT_OUT = {"output_dir", "resume", "overwrite", "dry_run"}  # they say nothing of the adapter
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
_FOLDER = "THIS_FOLDER"


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of one at the hub ("user/name", "gpt2") and is no path on this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def public(name: str) -> str:
    """A model or a data set as others may read it: its hub id, or the last name of its path."""
    return name if is_hub_id(name) else Path(name).name


def model_card(
    *,
    base_model: str,
    data: str,
    settings: Mapping[str, object],
    parameters: str,
    result: Evaluation | None,
    seconds: float,
    labels: tuple[str, ...] | None = None,
    multi_label: bool = False,
    tried: Tried | None = None,
) -> str:
    """README.md of an output folder: what it is, how it was made, what it does, how to use it.

    labels: the classes of a classifier (none for a regression); None for a language model. multi_label: a text has any
    number of them. tried: the settings among which those of the run were chosen.
    """
    front = front_matter(public(base_model), data=data, answers=labels is None)
    base_model, data = public(base_model), public(data)
    auto, head = "AutoModelForCausalLM", ""
    if labels is not None:
        auto, head = "AutoModelForSequenceClassification", f", num_labels={len(labels) or 1}"
    if multi_label:
        head += ', problem_type="multi_label_classification"'
    body = [
        f"# LoRA adapter for {Path(base_model).name}",
        "",
        f"Base model: `{base_model}`  ",
        f"Data: `{data}`  ",
        f"Training took {duration(seconds)}; {parameters}.",
        "",
        "## Use",
        "",
        "```python",
        "import lorakit",
        f"from transformers import {auto}",
        "",
        f'model = {auto}.from_pretrained("{base_model}"{head})',
        f'lorakit.load(model, "{_FOLDER}")',
        "```",
        "",
        f'The folder is PEFT\'s format: `PeftModel.from_pretrained(model, "{_FOLDER}")` reads it too.',
        "",
    ]
    if labels:
        named = ", ".join(f"`{label}`" for label in labels)
        meant = (
            "Of a text these are all classes whose logit is at least 0" if multi_label else "The largest logit decides"
        )
        body += [f"The logits are those of the classes {named}, in this order. {meant}.", ""]
    if result is not None:
        body += ["## Results", "", f"On {result.rows} held-out rows ({result.split}):", ""]
        body += [metrics_table(result).markdown(), ""]
        body += [line for note in result.notes for line in (f"Note: {note}.", "")]
        if result.samples:
            body += [_samples_table(telling(result.samples)[:5]).markdown(), ""]
    if tried is not None:
        body += ["## Settings tried", "", tried.choice, "", tried.table().markdown(), ""]
    values = (
        (name, public(value) if name in _PATHS and isinstance(value, str) else value_text(value))
        for name, value in settings.items()
        if name not in _LEFT_OUT
    )
    body += ["## Settings", "", Table(("setting", "value"), tuple(values), left=frozenset({0, 1})).markdown()]
    return "\n".join([front, *body]) + "\n"


def front_matter(base_model: str, *, data: str | None = None, answers: bool = True) -> str:
    """The YAML at the top of a card, from which the hub takes what a model is.

    data: as the user named it; only a hub id is written. answers: whether the model writes text.
    """
    import yaml

    facts: dict[str, object] = {
        "base_model": base_model,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation" if answers else "text-classification",
        "tags": ["lora", "lorakit"],
    }
    if data is not None and "/" in data and is_hub_id(data):
        facts["datasets"] = [data]
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, default_flow_style=None)}---\n"


def hub_card(card: str, base_model: str, repository: str) -> str:
    """The card of a folder as that of a repository: with the hub's name of the base model, and how to load it there."""
    if not card.startswith("---\n"):
        return f"{front_matter(base_model)}\n{card}"
    found = re.compile(r"^base_model: .*$", re.MULTILINE).sub(lambda _: f"base_model: {base_model}", card, count=1)
    found = re.sub(r"(?m)^Base model: `[^`]*`", lambda _: f"Base model: `{base_model}`", found, count=1)
    found = re.sub(r'(\.from_pretrained\()"[^"]*"(?=\)|, num_labels)', rf'\1"{base_model}"', found, count=1)
    found = found.replace(
        "import lorakit\nfrom", "import lorakit\nfrom huggingface_hub import snapshot_download\nfrom", 1
    )
    found = found.replace(
        f'lorakit.load(model, "{_FOLDER}")', f'lorakit.load(model, snapshot_download("{repository}"))'
    )
    return found.replace(f'"{_FOLDER}"', f'"{repository}"')


def _samples_table(samples: Sequence[Sample]) -> Table:
    rows = ((one.prompt, one.base, one.adapter, one.expected) for one in samples)
    cells = tuple(tuple(map(one_line, row)) for row in rows)
    return Table(("asked", "base", "adapter", "expected"), cells, left=frozenset(range(4)))
