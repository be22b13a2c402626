"""The tasks of a comparison: rows, a model, a loss, and scores.

`run.py` uses only `StudyTask`. Two kinds read any data that `lorakit train` reads: `Sequences` (a classifier or a
regression) and `Answers` (a causal language model). Others are subclasses, such as images in
benchmarks/experiments/vision.py.

If the data has no test split, its validation split is reported. Splits that are then missing are held out of the
training rows, in whole questions, so that no test question was seen in training.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...core.attach import adapted_layers
from ...core.errors import LoraError
from ...core.paths import expanded
from ...core.quantised import is_quantised
from ...core.switching import merge
from ...training.data import Data, Example, read_data
from ...training.evaluate import expected_of, predict
from ...training.folders import no_split, split_files
from ...training.generation import answers
from ...training.hub import Hub
from ...training.labels import MULTI_LABEL
from ...training.loss import causal_loss, frozen_head
from ...training.models import (
    Loaded,
    best_device,
    has_fast_bfloat16,
    load_causal_lm,
    load_classifier,
    load_tokenizer,
    skeleton,
)
from ...training.positions import longest_row
from ...training.prepare import check_task, fields_of, labels_of, target
from ...training.scores import METRICS, default_metrics, metrics_for
from ...training.tokens import encode_all, encode_text, prompt_ids, reference
from ..methods.baselines import Applied, Head
from .config import CompareConfig, TaskConfig

_HELD_OUT = 0.1  # share of the training rows, for each split that the data lacks
_BATCH = 16  # rows of a batch outside of training
_SERVED = 8  # rows of the latency measurement


Loss = Callable[[dict[str, Any]], Tensor]


class StudyTask(ABC):
    """Rows in three splits, a model to train on them, and its scores."""

    name: str
    source: str  # where the data came from
    kind: str
    rows: dict[str, int]  # of train, valid, test
    train: Sequence[Any]  # what `collate` takes
    metrics: tuple[str, ...]  # the scores of `test`; the first is plotted
    chosen_by: str  # the score of `validate` that chooses the learning rate; lower is better
    fingerprint: str  # of everything that decides a score, except the training settings
    head: Head = None  # modules that are a new head; None: found in the model
    longest: int = 0  # tokens of the longest row
    half: bool = False  # whether products are made in bfloat16

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """The pretrained model on its device, in eval mode, with a new head initialised by `seed`."""

    @abstractmethod
    def collate(self, rows: list[Any]) -> dict[str, Any]:
        """A batch of training rows."""

    @abstractmethod
    def loss(self, model: nn.Module, label_smoothing: float = 0.0) -> Loss:
        """A function from a batch to its mean loss. It is made again for each training run of `model`.

        If gradients of several batches are accumulated, each batch has the same weight.
        """

    @abstractmethod
    def validate(self, applied: Applied) -> dict[str, float]:
        """Scores on the validation rows, `chosen_by` among them."""

    @abstractmethod
    def test(self, applied: Applied) -> dict[str, float]:
        """A score for each of `metrics` on the test rows."""

    @abstractmethod
    def serve(self, model: nn.Module) -> None:
        """One forward pass over a few test rows, for the latency."""

    @abstractmethod
    def blueprint(self) -> nn.Module:
        """The model without its weights, called under FakeTensorMode, to count parameters."""


def read_task(task: TaskConfig, model: str) -> Sequences | Answers:
    """Read and check the data of a task. Loads the model's tokenizer, no weights. Raises what `read_data` raises."""
    settings = task.data
    assert settings.data is not None
    folder = Path(expanded(settings.data))
    if folder.is_dir() and not split_files(folder)["train"]:
        # `read_data` takes such a folder for one to evaluate on, and calls its test rows train.
        raise no_split(folder, "train")
    splits = {"train": settings.train_split, "valid": settings.valid_split, "test": settings.test_split}
    fields = fields_of(settings) | ({"references": settings.references_field} if settings.references_field else {})
    hub = Hub(settings.subset, settings.revision, splits)
    data = read_data(settings.data, fields=fields, task=settings.task, holdout=0.0, hub=hub)
    check_task(settings, data)
    kind = Answers if data.task == "causal-lm" else Sequences
    return kind(task.name, model, settings, _split(data, settings))


class _Text(StudyTask):
    """A task whose model reads text."""

    def __init__(self, name: str, model: str, settings: CompareConfig, data: Data) -> None:
        self.name, self.kind, self.source = name, data.task, settings.data or ""
        self.settings, self.data, self._model_name = settings, data, model
        self.tokenizer = load_tokenizer(model)
        self.device = best_device()
        with FakeTensorMode():
            self._limit = longest_row(settings.max_seq_length, self.blueprint(), self.tokenizer)
        self.half = settings.dtype == "auto" and has_fast_bfloat16(self.device)
        has_answers = data.train[0].text is None
        names = settings.metrics or default_metrics(data.task, has_answers)
        self.metrics = tuple(metric.name for metric in metrics_for(names, data.task, has_answers))
        self.rows = {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)}
        decides = (
            *("plain", "system", "template", "max_seq_length", "max_new_tokens", "beams", "length_penalty"),
            *("no_repeat_ngram", "dtype"),
        )
        said = {name: getattr(settings, name) for name in decides}
        if settings.quantize != "none":
            said["quantize"] = settings.quantize
        self.fingerprint = digest_of(model, self.metrics, said, *map(asdict, (*data.train, *data.valid, *data.test)))

    def blueprint(self) -> nn.Module:
        labels = labels_of(self.data)
        model: nn.Module = skeleton(
            self._model_name,
            labels=labels,
            multi_label=self.kind == MULTI_LABEL,
            dtype="float32",
            quantize=self.settings.quantize,
        )
        return model

    @property
    def loading(self) -> dict[str, Any]:
        """How the base is loaded."""
        settings: dict[str, Any] = {"dtype": "float32", "quantize": self.settings.quantize}
        return settings | {"device": self.device, "tokenizer": self.tokenizer}

    def products(self) -> AbstractContextManager[Any]:
        """The context in which products have the precision of the settings."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def _pad(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.tokenizer.pad(rows, return_tensors="pt").data
        return batch


class Sequences(_Text):
    """A class for each text, any number of classes, or a number.

    The learning rate is chosen by the loss: on a few hundred rows accuracy is too coarse to distinguish two rates, and
    while a method has hardly begun to learn it does not show which direction is better.
    """

    def __init__(self, name: str, model: str, settings: CompareConfig, data: Data) -> None:
        super().__init__(name, model, settings, data)
        self.train = [{**self._encoded(example), "labels": target(example, data)} for example in data.train]
        self.chosen_by = "loss"
        self._valid = [{**self._encoded(example), "labels": target(example, data)} for example in data.valid]
        tested = [self._encoded(example) for example in data.test]
        self.longest = max(len(row["input_ids"]) for row in (*self.train, *self._valid, *tested))
        self._few = self._pad(tested[:_SERVED])

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        several = self.kind == MULTI_LABEL
        loaded = load_classifier(self._model_name, labels=self.data.labels, multi_label=several, **self.loading)
        model: nn.Module = loaded.model
        return model

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        return self._pad(rows)

    def loss(self, model: nn.Module, label_smoothing: float = 0.0) -> Loss:
        def of(batch: dict[str, Any]) -> Tensor:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            with self.products():
                logits = model(**inputs).logits.float()
            if self.kind == MULTI_LABEL:  # each class is a question of its own, with two answers to smooth over
                wanted = batch["labels"] * (1 - label_smoothing) + label_smoothing / 2
                return F.binary_cross_entropy_with_logits(logits, wanted)
            if not self.data.labels:
                return F.mse_loss(logits.squeeze(-1), batch["labels"].float())
            return F.cross_entropy(logits, batch["labels"], label_smoothing=label_smoothing)

        return of

    def validate(self, applied: Applied) -> dict[str, float]:
        ordered = sorted(self._valid, key=lambda row: len(row["input_ids"]))
        total, loss = 0.0, self.loss(applied.model)
        with torch.no_grad():
            for start in range(0, len(ordered), _BATCH):
                rows = ordered[start : start + _BATCH]
                batch = {name: value.to(self.device) for name, value in self._pad(rows).items()}
                total += len(rows) * float(loss(batch))
        return {"loss": total / len(ordered), **self._scores(applied, self.data.valid)}

    def test(self, applied: Applied) -> dict[str, float]:
        return self._scores(applied, self.data.test)

    def serve(self, model: nn.Module) -> None:
        model(**{name: value.to(self.device) for name, value in self._few.items()})

    def _scores(self, applied: Applied, examples: Sequence[Example]) -> dict[str, float]:
        loaded = Loaded(applied.model, self.tokenizer)
        with self.products():
            found = predict(loaded, self.data, examples, self._limit, self.name)
        expected = [expected_of(example, self.data) for example in examples]
        return {name: METRICS[name].score(found, expected) for name in self.metrics}

    def _encoded(self, example: Example) -> dict[str, Any]:
        return dict(encode_text(example, self.tokenizer, self._limit))


class Answers(_Text):
    """Texts that a causal language model writes: answers to prompts, or plain text.

    The learning rate is chosen by the perplexity of the right answers. Answers are generated greedily or as the
    settings say. With bfloat16 products, a copy of the model in bfloat16 generates them; adapters are not merged in it.
    """

    def __init__(self, name: str, model: str, settings: CompareConfig, data: Data) -> None:
        train, valid, test = (_in_template(rows, settings) for rows in (data.train, data.valid, data.test))
        data = replace(data, train=train, valid=valid, test=test)
        super().__init__(name, model, settings, data)
        self.chosen_by = "perplexity"
        self.chat = self.tokenizer.chat_template is not None and not settings.plain
        self.train = self._tokens(data.train)
        self._valid, self._test = self._tokens(data.valid), self._tokens(data.test)
        for split, rows in (("train", self.train), ("valid", self._valid), ("test", self._test)):
            if not rows:
                raise LoraError(
                    f"no {split} row of {self.source} has room for its answer within {self._limit} tokens; "
                    f"raise max_seq_length, where the model has more positions."
                )
        self.longest = max(len(row["input_ids"]) for row in (*self.train, *self._valid, *self._test))
        # Without rows whose prompt alone is too long. Every test question is still asked.
        self.rows |= {"train": len(self.train), "valid": len(self._valid)}
        self._few = self.collate(self._test[:_SERVED])
        self._model: nn.Module | None = None

    def model(self, seed: int) -> nn.Module:
        if self._model is None:  # there is no new head, so one model serves all seeds
            loaded = load_causal_lm(self._model_name, **self.loading)
            self._model = loaded.model
        return self._model

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in rows)
        pads = {"input_ids": self.tokenizer.pad_token_id, "attention_mask": 0, "labels": -100}
        return {
            name: torch.tensor([row[name] + [pad] * (width - len(row[name])) for row in rows])
            for name, pad in pads.items()
        }

    def loss(self, model: nn.Module, label_smoothing: float = 0.0) -> Loss:
        with self.products():
            head = None if label_smoothing else frozen_head(model)  # found by running the model, so once

        def of(batch: dict[str, Any]) -> Tensor:
            with self.products():
                total = causal_loss(model, batch, head, label_smoothing)
            count: Tensor = (batch["labels"][:, 1:] != -100).sum()
            return total / count.clamp(min=1)

        return of

    def validate(self, applied: Applied) -> dict[str, float]:
        return {"perplexity": METRICS["perplexity"].score(*self._losses(applied.model, self._valid))}

    def test(self, applied: Applied) -> dict[str, float]:
        scores: dict[str, float] = {}
        written = [name for name in self.metrics if METRICS[name].of == "texts"]
        if written:
            expected = [(reference(example, self.tokenizer), *example.others) for example in self.data.test]
            found = self._answers(applied, expected)
            scores = {name: METRICS[name].score(found, expected) for name in written}
        if "perplexity" in self.metrics:
            scores["perplexity"] = METRICS["perplexity"].score(*self._losses(applied.model, self._test))
        return {name: scores[name] for name in self.metrics}

    def serve(self, model: nn.Module) -> None:
        model(**{name: self._few[name].to(self.device) for name in ("input_ids", "attention_mask")})

    @torch.no_grad()
    def _losses(self, model: nn.Module, rows: list[dict[str, Any]]) -> tuple[list[float], list[int]]:
        """For batches of rows of similar length: each batch's sum of −log p, and its number of labels."""
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
        sums, counts = [], []
        with self.products():
            head = frozen_head(model)
            for start in range(0, len(ordered), _BATCH):
                batch = {n: v.to(self.device) for n, v in self.collate(ordered[start : start + _BATCH]).items()}
                sums.append(float(causal_loss(model, batch, head)))
                counts.append(int((batch["labels"][:, 1:] != -100).sum()))
        return sums, counts

    def _answers(self, applied: Applied, expected: list[tuple[str, ...]]) -> list[str]:
        settings = self.settings
        model: Any = halved(copy.deepcopy(applied).model) if self.half else applied.model
        prompts = [
            prompt_ids(example, self.tokenizer, system=settings.system, chat=self.chat) for example in self.data.test
        ]
        limit = settings.max_new_tokens
        if limit is None:
            texts = [text for texts in expected for text in texts]
            limit = 16 + max(len(self.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        search: dict[str, Any] = {}
        if settings.beams > 1:
            search = {"num_beams": settings.beams, "length_penalty": settings.length_penalty}
        if settings.no_repeat_ngram:
            search["no_repeat_ngram_size"] = settings.no_repeat_ngram
        # Each beam holds its own copy of a row.
        size = max(1, 32 // settings.beams)
        loaded = Loaded(model, self.tokenizer)
        return list(answers(loaded, prompts, max_new_tokens=limit, batch_size=size, search=search))

    def _tokens(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        rows = encode_all(
            examples,
            self.tokenizer,
            max_length=self._limit,
            too_long="truncate",
            system=self.settings.system,
            chat=self.chat,
        ).rows
        return [
            {"input_ids": row.input_ids, "attention_mask": [1] * len(row.input_ids), "labels": row.labels}
            for row in rows
        ]


def served(applied: Applied, half: bool) -> nn.Module:
    """A copy of the model as it is used after training: LoRA merged, on a quantised base beside it. half: with weights
    in bfloat16.
    """
    model = copy.deepcopy(applied).model
    if adapted_layers(model) and not any(is_quantised(module) for module in model.modules()):
        merge(model)
    return halved(model) if half else model


def halved(model: nn.Module) -> nn.Module:
    """The model with its weights in bfloat16. Buffers keep float32, which rotary frequencies and running means need."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def digest_of(*parts: Any) -> str:
    """A short hash (16 hexadecimal digits) of the parts, as JSON."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


# --- splits --------------------------------------------------------------------------------------------------------


def _split(data: Data, settings: CompareConfig) -> Data:
    """Make three splits from those of the data. A validation or test question has all its right answers."""
    train = _questions(data.train)
    reported = data.test or data.valid
    valid = data.valid if data.test else []
    test_questions = _questions(reported) if reported else _held_out(train, settings.test_rows, 1)
    valid_questions = _questions(valid) if valid else _held_out(train, settings.valid_rows, 2)
    rows = [example for question in train for example in question]
    kept = _drawn([[row] for row in rows], settings.train_rows, 3)
    return replace(
        data,
        train=[row for question in kept for row in question],
        valid=[_together(question) for question in _drawn(valid_questions, settings.valid_rows, 4)],
        test=[_together(question) for question in _drawn(test_questions, settings.test_rows, 5)],
    )


def _questions(examples: Iterable[Example]) -> list[list[Example]]:
    """Group rows with the same prompt into one question. A row without a prompt is a separate question."""
    groups: dict[Any, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.where if example.prompt is None else example.prompt, []).append(example)
    return list(groups.values())


def _together(question: list[Example]) -> Example:
    """The rows of a question as one row, with every right answer."""
    first = question[0]
    if first.prompt is None:
        return first
    texts = [text for row in question for text in (row.completion, *row.others) if text is not None]
    unlike = tuple(dict.fromkeys(texts))
    return replace(first, completion=unlike[0], others=unlike[1:])


def _drawn(questions: list[list[Example]], limit: int | None, seed: int) -> list[list[Example]]:
    """At most `limit` of the questions, in their order. The choice is the same for all methods and seeds."""
    if limit is None or len(questions) <= limit:
        return questions
    chosen = sorted(random.Random(seed).sample(range(len(questions)), limit))
    return [questions[index] for index in chosen]


def _held_out(train: list[list[Example]], limit: int | None, seed: int) -> list[list[Example]]:
    """Take about a tenth of the questions, at most `limit`, out of `train` and return them."""
    count = max(1, round(_HELD_OUT * len(train)))
    count = min(count, limit or count)
    if len(train) <= count:
        raise LoraError(f"{len(train)} questions are too few to train on and to hold some out.")
    chosen = set(random.Random(seed).sample(range(len(train)), count))
    taken = [train[index] for index in sorted(chosen)]
    train[:] = [question for index, question in enumerate(train) if index not in chosen]
    return taken


def _in_template(examples: Sequence[Example], settings: CompareConfig) -> list[Example]:
    def one(example: Example) -> Example:
        if example.prompt is None or settings.template == "{prompt}":
            return example
        return replace(example, prompt=settings.template.replace("{prompt}", example.prompt))

    return [one(example) for example in examples]
