"""Answers and predictions on held-out rows, of the base model and of the adapted one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..core.attach import adapted_layers, disabled
from .data import Data, Example
from .generation import answers
from .metrics import accuracy, exact_match, pearson
from .models import Loaded
from .positions import longest_row
from .report import Comparison, Sample
from .tokens import encode_text, prompt_ids, reference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Style:
    """How a prompt is put to the model: in its chat template or as it stands, with which system message."""

    chat: bool
    system: str | None = None

    @classmethod
    def of_adapter(cls, adapter: str | Path | None, tokenizer: PreTrainedTokenizerBase, system: str | None) -> Style:
        """The style an adapter was trained with, as its config.yaml records it; `system` overrides the message."""
        recorded = _recorded(adapter)
        chat = tokenizer.chat_template is not None and not recorded.get("plain", False)
        return cls(chat, system if system is not None else recorded.get("system"))


def compare(
    loaded: Loaded,
    data: Data,
    split: str,
    examples: Sequence[Example],
    style: Style,
    *,
    max_length: int,
    max_new_tokens: int | None = None,
) -> Comparison:
    """Score the base model and, where the model has an adapter, the adapted one on `examples`.

    Causal models answer each prompt greedily and are scored by exact match; classifiers by accuracy, regressions by
    Pearson's correlation. max_new_tokens=None: 16 more than the longest expected answer.
    """
    if data.task != "causal-lm":
        return _compare_labels(loaded, data, split, examples, max_length)
    examples = [example for example in examples if example.text is None]
    if not examples:
        return Comparison(0, split, {}, ())  # plain text has no prompt to answer
    prompts = [prompt_ids(example, loaded.tokenizer, system=style.system, chat=style.chat) for example in examples]
    expected = [reference(example, loaded.tokenizer) for example in examples]
    longest = max(len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected)
    limit = max_new_tokens or longest + 16

    def generate(label: str) -> list[str]:
        found = answers(loaded, prompts, max_new_tokens=limit)
        return list(_progress(found, len(prompts), f"answering with the {label}"))

    with disabled(loaded.model):
        base = generate("base model")
    adapted = generate("adapter") if adapted_layers(loaded.model) else base
    before, after = (tuple(map(exact_match, found, expected)) for found in (base, adapted))
    samples = tuple(map(Sample, [_question(example) for example in examples], base, adapted, expected))
    rates = (sum(before) / len(before), sum(after) / len(after))
    return Comparison(len(examples), split, {"exact match": rates}, samples, after)


def _compare_labels(loaded: Loaded, data: Data, split: str, examples: Sequence[Example], max_length: int) -> Comparison:
    max_length = longest_row(max_length, loaded.model, loaded.tokenizer)
    with disabled(loaded.model):
        base = predict(loaded, data, examples, max_length, "base model")
    adapted = predict(loaded, data, examples, max_length, "adapter")
    asked = [" | ".join(filter(None, (example.text, example.text_pair))) for example in examples]
    if data.labels:
        expected = [str(example.label) for example in examples]
        metrics = {"accuracy": (accuracy(base, expected), accuracy(adapted, expected))}
    else:
        numbers = [float(example.label or 0.0) for example in examples]
        metrics = {"pearson": (pearson(base, numbers), pearson(adapted, numbers))}
        base, adapted, expected = ([f"{number:.3f}" for number in column] for column in (base, adapted, numbers))
    right = tuple(a == e for a, e in zip(adapted, expected, strict=True))
    return Comparison(len(examples), split, metrics, tuple(map(Sample, asked, base, adapted, expected)), right)


@torch.inference_mode()
def predict(loaded: Loaded, data: Data, examples: Sequence[Example], max_length: int, label: str) -> list[Any]:
    """The class name, or for a regression the number, that the model gives each example, in order.

    Rows of like length share a batch. label: what the progress bar calls the model.
    """
    encoded = [encode_text(example, loaded.tokenizer, max_length) for example in examples]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    found: dict[int, Any] = {}
    size = 32
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for batch in _progress(batches, len(batches), f"predicting with the {label}"):
        rows = [encoded[index] for index in batch]
        inputs = loaded.tokenizer.pad(rows, return_tensors="pt").to(loaded.device)
        logits = loaded.model(**inputs).logits.float()
        if data.labels:
            answered = [data.labels[index] for index in logits.argmax(-1).tolist()]
        else:
            answered = logits[:, 0].tolist()
        found.update(zip(batch, answered, strict=True))
    return [found[index] for index in range(len(encoded))]


def _question(example: Example) -> str:
    """What a person asked in this row, without the template around it."""
    if example.messages is not None:
        asked = [message["content"] for message in example.messages if message["role"] == "user"]
        return asked[-1] if asked else ""
    return example.prompt or ""


def _progress(items: Any, total: int, label: str) -> Any:
    return tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())


def _recorded(adapter: str | Path | None) -> dict[str, Any]:
    """The settings an adapter's folder records; none for an adapter made elsewhere."""
    path = Path(adapter or "") / "config.yaml"
    if adapter is None or not path.is_file():
        return {}
    import yaml

    return dict(yaml.safe_load(path.read_text(encoding="utf-8")))
