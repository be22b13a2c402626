"""Answers and predictions on held-out rows, of the base model and of the adapted one."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bank.bank import Bank
from ..core.attach import adapted_layers
from ..core.switching import disabled
from .bars import progress_bar
from .data import Data, Example
from .generation import Within, answers, as_it_is
from .intervals import Ends, bootstrap, wilson
from .labels import MULTI_LABEL
from .metrics import accuracy, class_counts, exact_match, f1_of_counts, pearson
from .models import Loaded
from .positions import longest_row, positions
from .report import Evaluation, Sample
from .style import Style
from .tokens import encode_all, encode_text, prompt_ids, reference

MICRO_F1, EXACT_SET = "micro-F1", "exact set match"  # the scores of multi-label rows


@dataclass(frozen=True)
class ComparedRow:
    """One row: what the base model and the adapted one give for it, and what is expected.

    Of plain text: Σ −log p by either, in nats, and the number of tokens that it is a sum over.
    """

    example: Example
    base: Any
    adapted: Any
    expected: Any


@dataclass(frozen=True)
class Compared:
    """Rows that were scored by one metric: exact match, perplexity, accuracy, pearson or micro-F1.

    Beside micro-F1 stands the share of the rows whose classes are all right.
    """

    metric: str
    rows: tuple[ComparedRow, ...]
    notes: tuple[str, ...] = ()

    def evaluation(self, split: str) -> Evaluation:
        """The score of the base model and of the adapted one on these rows."""
        if not self.rows:
            return Evaluation(0, split, {}, (), notes=self.notes)
        base, adapted = ([getattr(own, side) for own in self.rows] for side in ("base", "adapted"))
        expected = [own.expected for own in self.rows]
        scores, ends = zip(*(_scored(self.metric, found, expected) for found in (base, adapted)), strict=True)
        metrics, intervals = {self.metric: scores}, {} if None in ends else {self.metric: ends}
        if self.metric == MICRO_F1:
            scores, ends = zip(*(_scored(EXACT_SET, found, expected) for found in (base, adapted)), strict=True)
            metrics[EXACT_SET], intervals[EXACT_SET] = scores, ends
        if self.metric == "perplexity":
            return Evaluation(len(expected), split, metrics, (), (), self.notes, intervals)
        right: tuple[bool, ...] = ()
        if self.metric == MICRO_F1:
            base, adapted, expected = (
                [", ".join(classes) or "no class" for classes in own] for own in (base, adapted, expected)
            )
        if self.metric == "pearson":
            base, adapted, expected = ([f"{number:.3f}" for number in own] for own in (base, adapted, expected))
        else:
            right = tuple(map(exact_match if self.metric == "exact match" else operator.eq, adapted, expected))
        samples = tuple(map(Sample, (question(own.example) for own in self.rows), base, adapted, expected))
        return Evaluation(len(expected), split, metrics, samples, right, self.notes, intervals)


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
    perplexity. Classifiers are scored by accuracy; where a text has any number of classes, by micro-F1 and by the share
    of rows whose classes are all right. Regressions are scored by Pearson's correlation.
    max_new_tokens=None: 16 more than the longest expected answer.
    """
    compared = compare_rows(loaded, data, examples, style, max_length=max_length, max_new_tokens=max_new_tokens)
    return compared.evaluation(split)


def compare_rows(
    loaded: Loaded,
    data: Data,
    examples: Sequence[Example],
    style: Style,
    *,
    max_length: int,
    max_new_tokens: int | None = None,
    bank: Bank | None = None,
    known: Compared | None = None,
) -> Compared:
    """What `evaluate` scores, row by row.

    bank: the model's; each row is then computed with the adapter that it names. known: what was found for the same rows
    asked in the same way with another adapter, of which the base model's part is taken over.
    """
    if data.task != "causal-lm":
        return _compare_labels(loaded, data, examples, max_length, bank, known)
    if examples and all(example.text is not None for example in examples):
        return _compare_texts(loaded, examples, style, max_length, bank, known)
    asked = to_answer(loaded, examples, style, max_new_tokens)

    def generate(label: str, within: Within) -> list[str]:
        found = answers(loaded, asked.prompts, max_new_tokens=asked.max_new_tokens, within=within)
        return list(progress_bar(found, total=len(asked.prompts), doing=f"answering with the {label}"))

    return _both("exact match", loaded, asked.rows, asked.expected, asked.notes, generate, bank, known)


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


def _both(
    metric: str,
    loaded: Loaded,
    examples: Sequence[Example],
    expected: Sequence[Any],
    notes: tuple[str, ...],
    run: Callable[[str, Within], list[Any]],
    bank: Bank | None,
    known: Compared | None,
) -> Compared:
    """What is found for each row. run(label, within): what the model gives for each of them."""
    if known is not None:
        base = [own.base for own in known.rows]
    else:
        with disabled(loaded.model):
            base = run("base model", as_it_is)
    adapted = base
    if bank is not None:
        names = [example.adapter for example in examples]
        adapted = run("adapters", lambda batch: bank.rows([names[index] for index in batch]))
    elif adapted_layers(loaded.model):
        adapted = run("adapter", as_it_is)
    return Compared(metric, tuple(map(ComparedRow, examples, base, adapted, expected)), notes)


def _scored(metric: str, found: Sequence[Any], expected: Sequence[Any]) -> tuple[float, Ends | None]:
    """The score of these rows and the ends of its 95 % interval, which a single row does not always have."""
    if metric in ("exact match", "accuracy", EXACT_SET):
        share = accuracy(found, expected)
        if metric == "exact match":
            share = sum(map(exact_match, found, expected)) / len(expected)
        return share, wilson(share, len(expected))
    if metric == MICRO_F1:
        columns = [torch.tensor(column, dtype=torch.float64) for column in class_counts(found, expected)]
        return micro_f1(*columns), bootstrap(micro_f1, *columns)
    score = perplexity if metric == "perplexity" else _correlation
    columns = [torch.tensor(column, dtype=torch.float64) for column in (found, expected)]
    return score(*columns), bootstrap(score, *columns)


def micro_f1(right: Tensor, named: Tensor) -> float:
    """F1 over all classes of all rows together.   right (rows,), named (rows,): `class_counts`"""
    return f1_of_counts(float(right.sum()), float(named.sum()))


def perplexity(losses: Tensor, counts: Tensor) -> float:
    """exp(Σ −log p / Σ tokens) over all texts.   losses (texts,): Σ −log p of each   counts (texts,): its tokens"""
    return math.exp(min(float(losses.sum() / counts.sum().clamp_min(1)), 700.0))  # exp(710) overflows


def compare_general(loaded: Loaded, examples: Sequence[Example], max_length: int) -> Evaluation:
    """The perplexity of text that has nothing to do with the training, without and with the adapter."""
    return _compare_texts(loaded, examples, Style(False), max_length, None, None).evaluation("general")


def _correlation(predicted: Tensor, expected: Tensor) -> float:
    return pearson(predicted.tolist(), expected.tolist())


def _compare_texts(
    loaded: Loaded,
    examples: Sequence[Example],
    style: Style,
    max_length: int,
    bank: Bank | None,
    known: Compared | None,
) -> Compared:
    limit = longest_row(max_length, loaded.model, loaded.tokenizer)
    encoded = encode_all(
        examples, loaded.tokenizer, max_length=limit, too_long="truncate", system=style.system, chat=style.chat
    )
    notes = (f"{encoded.truncated} texts cut at {limit} tokens",) if encoded.truncated else ()
    rows = [row.input_ids for row in encoded.rows]

    def losses(label: str, within: Within) -> list[float]:
        found = []
        for index, ids in enumerate(progress_bar(rows, total=len(rows), doing=f"reading with the {label}")):
            tokens = torch.tensor([ids], device=loaded.device)
            with within([index]), torch.inference_mode():
                logits = loaded.model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, :-1].float()
                found.append(float(F.cross_entropy(logits, tokens[0, 1:], reduction="sum")))
        return found

    counts = [len(ids) - 1 for ids in rows]  # one for each example: every token of a text bears loss, none is dropped
    return _both("perplexity", loaded, examples, counts, notes, losses, bank, known)


def _compare_labels(
    loaded: Loaded,
    data: Data,
    examples: Sequence[Example],
    max_length: int,
    bank: Bank | None,
    known: Compared | None,
) -> Compared:
    def run(label: str, within: Within) -> list[Any]:
        return predict(loaded, data, examples, max_length, label, within) if examples else []

    metric = MICRO_F1 if data.task == MULTI_LABEL else "accuracy" if data.labels else "pearson"
    expected = [expected_of(example, data) for example in examples]
    random = loaded.new_parameters and examples
    notes = ("the base model's head is new and random: its score is chance",) if random else ()
    return _both(metric, loaded, examples, expected, notes, run, bank, known)


def predict(
    loaded: Loaded,
    data: Data,
    examples: Sequence[Example],
    max_length: int,
    label: str,
    within: Within = as_it_is,
) -> list[Any]:
    """What the model predicts for each example, in order: a class name, a tuple of them (multi-label), or a number.

    Rows of similar length share a batch. label: what the progress bar calls the model. within: as for `answers`.
    """
    logits = outputs(loaded, examples, max_length, f"predicting with the {label}", within)
    if not data.labels:
        return logits[:, 0].tolist()
    if data.task == MULTI_LABEL:  # a probability of at least 0.5 is a logit of at least 0
        return [tuple(itertools.compress(data.labels, row)) for row in (logits >= 0).tolist()]
    return [data.labels[index] for index in logits.argmax(-1).tolist()]


def expected_of(example: Example, data: Data) -> Any:
    """What `predict` gives for an example if it is right."""
    if isinstance(example.label, tuple):
        return example.label
    return str(example.label) if data.labels else float(example.label or 0.0)


@torch.inference_mode()
def outputs(
    loaded: Loaded, examples: Sequence[Example], max_length: int, doing: str, within: Within = as_it_is
) -> Tensor:
    """The logits of a classifier or the numbers of a regression, of shape (examples, classes or 1), in order.

    Texts are cut at `max_length` tokens and at the model's positions. doing: what the progress bar says. within: as for
    `answers`.
    """
    max_length = longest_row(max_length, loaded.model, loaded.tokenizer)
    encoded = [encode_text(example, loaded.tokenizer, max_length) for example in examples]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    found: dict[int, Tensor] = {}
    size = 32
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    for batch in progress_bar(batches, total=len(batches), doing=doing):
        rows = [encoded[index] for index in batch]
        inputs = loaded.tokenizer.pad(rows, return_tensors="pt").to(loaded.device)
        with within(batch):
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
