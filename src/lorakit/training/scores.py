"""Scores on the scale that papers print, each from the implementation that papers use.

Shares and correlations are times 100 (an accuracy of 95.1). BLEU, chrF and TER are sacrebleu's 0 to 100. Perplexity is
not scaled. A score is one number for all rows together. It is computed from

    classes, numbers    predicted and expected: one of each for a row
    class lists         predicted and expected: all classes of a row, in the order of the task's classes
    texts               the answers; and for each question a tuple of all its references
    loss                Σ −log p of each row, in nats; and the number of tokens in that sum

Every score raises ValueError if there are no rows, or if the two sides differ in length. If one side is constant, a
correlation is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ..core.errors import LoraError
from ..core.words import suggestion
from . import metrics
from .labels import MULTI_LABEL


@dataclass(frozen=True)
class Metric:
    """A score: its name, what it is computed from, whether higher is better, and its least and greatest value."""

    name: str
    of: Literal["classes", "class lists", "numbers", "texts", "loss"]
    score: Callable[[Sequence[Any], Sequence[Any]], float]  # predicted, expected
    higher_is_better: bool = True
    bounds: tuple[float | None, float | None] = (0.0, 100.0)


def default_metrics(task: str, answers: bool) -> tuple[str, ...]:
    """The names of the metrics that are usually reported for a task, the most informative first.

    answers: for causal-lm, whether its rows have prompts to answer; without prompts only the text is scored.
    """
    _scored(task, answers)
    if task == "classification":
        return "accuracy", "matthews"
    if task == MULTI_LABEL:
        return "micro-f1", "exact-set"
    if task == "regression":
        return "pearson", "spearman"
    return ("exact-match", "bleu", "chrf", "rouge-l", "perplexity") if answers else ("perplexity",)


def metrics_for(names: Sequence[str], task: str, answers: bool) -> list[Metric]:
    """The metrics of these names. Raises ValueError for one that is unknown or does not fit the task."""
    scored = _scored(task, answers)
    fitting = ", ".join(name for name, metric in METRICS.items() if metric.of in scored)
    for name in names:
        if name not in METRICS:
            raise LoraError(f"unknown metric {name!r}.{suggestion(name, METRICS)} This task has: {fitting}.")
        if METRICS[name].of not in scored:
            here = f"{task} without prompts" if task == "causal-lm" and not answers else task
            raise LoraError(f"{name} is for {METRICS[name].of}; this task is {here}. It has: {fitting}.")
    return [METRICS[name] for name in names]


def logged_as(metric: str) -> str:
    """What a metric of held-out rows is called in the history of a run and in metrics.jsonl."""
    return f"eval_{metric.replace('-', '_')}"


def _scored(task: str, answers: bool) -> tuple[str, ...]:
    """The outputs of a model for this task that can be scored."""
    if task == "causal-lm":
        return ("texts", "loss") if answers else ("loss",)
    kinds = {"classification": ("classes",), MULTI_LABEL: ("class lists",), "regression": ("numbers",)}
    if task not in kinds:
        raise LoraError(f"no metrics for the task {task!r}, only for: {', '.join(kinds)}, causal-lm.")
    return kinds[task]


# --- classes -------------------------------------------------------------------------------------------------------


def _accuracy(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    _check(predicted, expected)
    return 100 * metrics.accuracy(predicted, expected)


def _matthews(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    """Matthews' correlation; for more than two classes Gorodkin's R_K, which is equal to it for two."""
    from sklearn.metrics import matthews_corrcoef

    _check(predicted, expected)
    if _constant(predicted) or _constant(expected):
        return 0.0
    with _many_classes():
        return 100 * float(matthews_corrcoef(expected, predicted))


def _f1(predicted: Sequence[Any], expected: Sequence[Any]) -> float:
    """For two classes, the F1 of the class that sorts last; for more, the mean of all classes' F1 (macro).

    GLUE reports the F1 of its class 1, which sorts after 0. Only classes that occur on either side count.
    """
    from sklearn.metrics import f1_score

    _check(predicted, expected)
    classes = sorted({*predicted, *expected})
    counted = classes if len(classes) > 2 else classes[-1:]
    with _many_classes():
        return 100 * float(f1_score(expected, predicted, labels=counted, average="macro"))


@contextmanager
def _many_classes() -> Iterator[None]:
    """Within the block, silence scikit-learn's warning that many classes in few rows may be numbers: they are not."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        yield


# --- class lists ---------------------------------------------------------------------------------------------------


def _micro_f1(predicted: Sequence[Sequence[str]], expected: Sequence[Sequence[str]]) -> float:
    """F1 over all classes of all rows together."""
    _check(predicted, expected)
    return 100 * metrics.f1_of_counts(*map(sum, metrics.class_counts(predicted, expected)))


# --- numbers -------------------------------------------------------------------------------------------------------


def _pearson(predicted: Sequence[float], expected: Sequence[float]) -> float:
    _check(predicted, expected)
    return 100 * metrics.pearson(predicted, expected)


def _spearman(predicted: Sequence[float], expected: Sequence[float]) -> float:
    """Pearson's correlation of the ranks; equal numbers share the mean of their ranks."""
    from scipy.stats import spearmanr

    _check(predicted, expected)
    if _constant(predicted) or _constant(expected):
        return 0.0
    return 100 * float(spearmanr(predicted, expected).statistic)


# --- texts ---------------------------------------------------------------------------------------------------------


def _exact_match(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> float:
    """The share of answers that match any of their references, as `training.metrics.exact_match` does."""
    _check_texts(predicted, expected)
    right = sum(
        any(metrics.exact_match(answer, reference) for reference in references)
        for answer, references in zip(predicted, expected, strict=True)
    )
    return 100 * right / len(predicted)


def _bleu(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> float:
    """BLEU as in the command sacrebleu: case-sensitive, tokenizer 13a, exponential smoothing, orders 1 to 4.

    If the answers have no n-gram of some order, the score is 0, even if every answer is right. It is therefore not
    suitable if all answers are shorter than four tokens.
    """
    from sacrebleu.metrics import BLEU

    return float(BLEU(force=True).corpus_score(predicted, _streams(predicted, expected)).score)


def _chrf(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> float:
    """chrF2 as in the command sacrebleu: character n-grams of orders 1 to 6 without white space; recall counts double.

    The n-grams are counted against each question's best reference.
    """
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(predicted, _streams(predicted, expected)).score)


def _rouge_l(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> float:
    """The F1 of the longest common subsequence of words, with each question's best reference; mean over questions.

    No stemmer. Words are runs of a–z and 0–9 in lower case, as in the original ROUGE. Texts in other scripts have no
    words and score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    _check_texts(predicted, expected)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    best = [
        scorer.score_multi(references, answer)["rougeL"].fmeasure
        for answer, references in zip(predicted, expected, strict=True)
    ]
    return 100 * float(sum(best)) / len(best)


def _ter(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> float:
    """TER as in the command sacrebleu: edits and moved phrases for each 100 words of reference, ignoring case.

    The edits are those to each question's nearest reference. The words are the mean over its references.
    """
    from sacrebleu.metrics import TER

    return float(TER().corpus_score(predicted, _streams(predicted, expected)).score)


def _streams(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> list[list[str | None]]:
    """The references as sacrebleu takes them: all first ones, all second ones, …; None if a question has no more.

    An empty text would be wrong: it counts as a reference of length 0, which makes TER's divisor smaller.
    """
    _check_texts(predicted, expected)
    most = max(map(len, expected))
    return [[references[i] if i < len(references) else None for references in expected] for i in range(most)]


# --- loss ----------------------------------------------------------------------------------------------------------


def _perplexity(losses: Sequence[float], tokens: Sequence[int]) -> float:
    """exp(Σ −log p / Σ tokens) over all rows: a long row counts more than a short one."""
    _check(losses, tokens)
    count = sum(tokens)
    if not count:
        raise LoraError("the perplexity of no token.")
    try:
        return math.exp(sum(losses) / count)
    except OverflowError:
        return math.inf


# --- checks --------------------------------------------------------------------------------------------------------


def _check(predicted: Sequence[Any], expected: Sequence[Any]) -> None:
    if len(predicted) != len(expected):
        raise LoraError(f"{len(predicted)} predictions for {len(expected)} rows.")
    if not len(expected):
        raise LoraError("a score of no rows.")


def _check_texts(predicted: Sequence[str], expected: Sequence[tuple[str, ...]]) -> None:
    _check(predicted, expected)
    for row, references in enumerate(expected):
        if not references:
            raise LoraError(f"question {row + 1} has no reference.")


def _constant(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("accuracy", "classes", _accuracy),
        Metric("matthews", "classes", _matthews, bounds=(-100.0, 100.0)),
        Metric("f1", "classes", _f1),
        Metric("micro-f1", "class lists", _micro_f1),
        Metric("exact-set", "class lists", _accuracy),  # the share of the rows whose classes are all right
        Metric("pearson", "numbers", _pearson, bounds=(-100.0, 100.0)),
        Metric("spearman", "numbers", _spearman, bounds=(-100.0, 100.0)),
        Metric("exact-match", "texts", _exact_match),
        Metric("bleu", "texts", _bleu),
        Metric("chrf", "texts", _chrf),
        Metric("rouge-l", "texts", _rouge_l),
        Metric("ter", "texts", _ter, higher_is_better=False, bounds=(0.0, None)),
        Metric("perplexity", "loss", _perplexity, higher_is_better=False, bounds=(1.0, None)),
    )
}


def bounds_of(metric: str) -> tuple[float | None, float | None]:
    """The least and the greatest value of a score; no bounds for one that lorakit does not know."""
    return METRICS[metric].bounds if metric in METRICS else (None, None)
