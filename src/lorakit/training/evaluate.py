"""Answers and predictions on held-out rows, of the base model and of the adapted one."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from ..core.attach import adapted_layers
from ..core.switching import disabled
from .data import Data, Example
from .generation import answers
from .intervals import Ends, bootstrap, wilson
from .metrics import accuracy, exact_match, pearson
from .models import Loaded
from .positions import longest_row, positions
from .report import Evaluation, Sample
from .style import Style
from .tokens import encode_all, encode_text, prompt_ids, reference


def evaluate(
    loaded: Loaded,
    data: Data,
    split: str,
    examples: Sequence[Example],
    style: Style,
    *,
    max_length: int,
    max_new_tokens: int | None = None,
) -> Evaluation:
    """Score the base model and, if the model has an adapter, the adapted one on `examples`.

    Causal models answer each prompt greedily and are scored by exact match; on plain text they are scored by
    perplexity. Classifiers are scored by accuracy, regressions by Pearson's correlation.
    max_new_tokens=None: 16 more than the longest expected answer.
    """
    if not examples:
        return Evaluation(0, split, {}, ())
    if data.task != "causal-lm":
        return _compare_labels(loaded, data, split, examples, max_length)
    if all(example.text is not None for example in examples):
        return _compare_texts(loaded, split, examples, style, max_length)
    asked = to_answer(loaded, examples, style, max_new_tokens)
    if not asked.rows:
        return Evaluation(0, split, {}, (), notes=asked.notes)
    expected = asked.expected

    def generate(label: str) -> list[str]:
        found = answers(loaded, asked.prompts, max_new_tokens=asked.max_new_tokens)
        return list(_progress(found, len(asked.prompts), f"answering with the {label}"))

    with disabled(loaded.model):
        base = generate("base model")
    adapted = generate("adapter") if adapted_layers(loaded.model) else base
    before, after = (tuple(map(exact_match, found, expected)) for found in (base, adapted))
    samples = tuple(map(Sample, map(question, asked.rows), base, adapted, expected))
    rates = (sum(before) / len(before), sum(after) / len(after))
    intervals = _of_rates(rates, len(asked.rows))
    return Evaluation(len(asked.rows), split, {"exact match": rates}, samples, after, asked.notes, intervals)


@dataclass(frozen=True)
class Asked:
    """The rows that a language model is to answer, the token ids of their prompts, and the expected answers."""

    rows: list[Example]
    prompts: list[list[int]]
    expected: list[str]
    max_new_tokens: int
    notes: tuple[str, ...] = ()


def to_answer(loaded: Loaded, examples: Sequence[Example], style: Style, max_new_tokens: int | None) -> Asked:
    """The examples with a prompt that leaves room for an answer. Notes say how many are too long.

    max_new_tokens=None: 16 more than the longest expected answer.
    """
    asked = [example for example in examples if example.text is None]
    prompts = [prompt_ids(example, loaded.tokenizer, system=style.system, chat=style.chat) for example in asked]
    notes: tuple[str, ...] = ()
    limit = positions(loaded.model, loaded.tokenizer)
    if limit is not None and any(len(prompt) >= limit for prompt in prompts):
        long = [example.where for example, prompt in zip(asked, prompts, strict=True) if len(prompt) >= limit]
        notes = (f"{len(long)} rows left out, {long[0]} first: the model has positions for {limit} tokens",)
        kept = [(e, p) for e, p in zip(asked, prompts, strict=True) if len(p) < limit]
        asked, prompts = [example for example, _ in kept], [prompt for _, prompt in kept]
    expected = [reference(example, loaded.tokenizer) for example in asked]
    lengths = [len(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in expected]
    return Asked(asked, prompts, expected, max_new_tokens or max(lengths, default=0) + 16, notes)


def _compare_texts(
    loaded: Loaded, split: str, examples: Sequence[Example], style: Style, max_length: int
) -> Evaluation:
    """Compare by perplexity: exp of the mean over all tokens of −log p."""
    limit = longest_row(max_length, loaded.model, loaded.tokenizer)
    encoded = encode_all(
        examples, loaded.tokenizer, max_length=limit, too_long="truncate", system=style.system, chat=style.chat
    )
    if not encoded.rows:
        return Evaluation(0, split, {}, ())
    notes = (f"{encoded.truncated} texts cut at {limit} tokens",) if encoded.truncated else ()
    rows = [row.input_ids for row in encoded.rows]
    counts = torch.tensor([len(ids) - 1 for ids in rows], dtype=torch.float64)

    def losses(label: str) -> Tensor:
        """Σ −log p of each text, in nats."""
        found = []
        for ids in _progress(rows, len(rows), f"reading with the {label}"):
            tokens = torch.tensor([ids], device=loaded.device)
            with torch.inference_mode():
                logits = loaded.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, :-1].float()
                found.append(float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum")))
        return torch.tensor(found, dtype=torch.float64)

    with disabled(loaded.model):
        base = losses("base model")
    adapted = losses("adapter") if adapted_layers(loaded.model) else base
    scores = (perplexity(base, counts), perplexity(adapted, counts))
    ends = bootstrap(perplexity, base, counts), bootstrap(perplexity, adapted, counts)
    return Evaluation(len(rows), split, {"perplexity": scores}, (), notes=notes, intervals=_known("perplexity", *ends))


def perplexity(losses: Tensor, counts: Tensor) -> float:
    """exp(Σ −log p / Σ tokens) over all texts.   losses (texts,): Σ −log p of each   counts (texts,): its tokens"""
    return math.exp(min(float(losses.sum() / counts.sum().clamp_min(1)), 700.0))  # exp(710) overflows


def compare_general(loaded: Loaded, examples: Sequence[Example], max_length: int) -> Evaluation:
    """The perplexity of text that has nothing to do with the training, without and with the adapter."""
    return _compare_texts(loaded, "general", examples, Style(False), max_length)


def _compare_labels(loaded: Loaded, data: Data, split: str, examples: Sequence[Example], max_length: int) -> Evaluation:
    with disabled(loaded.model):
        base = predict(loaded, data, examples, max_length, "base model")
    adapted = predict(loaded, data, examples, max_length, "adapter") if adapted_layers(loaded.model) else base
    asked = list(map(question, examples))
    if data.labels:
        expected = [str(example.label) for example in examples]
        rates = accuracy(base, expected), accuracy(adapted, expected)
        metrics, intervals = {"accuracy": rates}, _of_rates(rates, len(examples), "accuracy")
        right = tuple(a == e for a, e in zip(adapted, expected, strict=True))
    else:
        numbers = [float(example.label or 0.0) for example in examples]
        metrics = {"pearson": (pearson(base, numbers), pearson(adapted, numbers))}
        truth = torch.tensor(numbers, dtype=torch.float64)
        ends = (bootstrap(_correlation, torch.tensor(one, dtype=torch.float64), truth) for one in (base, adapted))
        intervals, right = _known("pearson", *ends), ()
        base, adapted, expected = ([f"{number:.3f}" for number in column] for column in (base, adapted, numbers))
    notes = ("the base model's head is new and random: its score is chance",) if loaded.new_parameters else ()
    samples = tuple(map(Sample, asked, base, adapted, expected))
    return Evaluation(len(examples), split, metrics, samples, right, notes, intervals)


def _of_rates(rates: tuple[float, float], rows: int, name: str = "exact match") -> dict[str, tuple[Ends, Ends]]:
    return {name: (wilson(rates[0], rows), wilson(rates[1], rows))}


def _known(name: str, base: Ends | None, adapter: Ends | None) -> dict[str, tuple[Ends, Ends]]:
    """The intervals of a metric; empty if a single row gives none."""
    return {} if base is None or adapter is None else {name: (base, adapter)}


def _correlation(predicted: Tensor, expected: Tensor) -> float:
    return pearson(predicted.tolist(), expected.tolist())


def predict(loaded: Loaded, data: Data, examples: Sequence[Example], max_length: int, label: str) -> list[Any]:
    """The class name, or for a regression the number, that the model predicts for each example, in order.

    Rows of similar length share a batch. label: what the progress bar calls the model.
    """
    logits = outputs(loaded, examples, max_length, f"predicting with the {label}")
    if not data.labels:
        return logits[:, 0].tolist()
    return [data.labels[index] for index in logits.argmax(-1).tolist()]


@torch.inference_mode()
def outputs(loaded: Loaded, examples: Sequence[Example], max_length: int, doing: str) -> Tensor:
    """The logits of a classifier or the numbers of a regression, of shape (examples, classes or 1), in order.

    Texts are cut at `max_length` tokens and at the model's positions. doing: what the progress bar says.
    """
    max_length = longest_row(max_length, loaded.model, loaded.tokenizer)
    encoded = [encode_text(example, loaded.tokenizer, max_length) for example in examples]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    found: dict[int, Tensor] = {}
    size = 32
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for batch in _progress(batches, len(batches), doing):
        rows = [encoded[index] for index in batch]
        inputs = loaded.tokenizer.pad(rows, return_tensors="pt").to(loaded.device)
        found.update(zip(batch, loaded.model(**inputs).logits.float().cpu(), strict=True))
    return torch.stack([found[index] for index in range(len(encoded))])


def question(example: Example) -> str:
    """What a person asked in this row, without the template around it."""
    if example.text is not None:
        return " | ".join(filter(None, (example.text, example.text_pair)))
    if example.messages is not None:
        asked = [message["content"] for message in example.messages if message["role"] == "user"]
        return asked[-1] if asked else ""
    return example.prompt or ""


def _progress(items: Any, total: int, label: str) -> Any:
    return tqdm(items, total=total, desc=label, leave=False, dynamic_ncols=True, disable=not sys.stderr.isatty())
