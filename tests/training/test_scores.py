"""Each score compared with its definition, written here, and with the programs that papers use."""

import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lorakit.training.scores import METRICS, bounds_of, default_metrics, metrics_for

ANSWERS = [
    "the cat sat on the mat near the old door",
    "a quick brown fox jumps over a lazy dog",
    "it rains in the north",
]
REFERENCES = [
    ("the cat is on the mat near the door", "a cat sat on the mat by the old door", "there is a cat"),
    ("the quick brown fox jumps over the lazy dog today",),
    ("it rains in the north of the country", "it is raining in the north"),
]


def score(name: str, predicted: object, expected: object) -> float:
    return METRICS[name].score(predicted, expected)  # type: ignore[arg-type]


def test_names_in_order_and_which_way_is_better() -> None:
    assert list(METRICS) == [
        *("accuracy", "matthews", "f1", "micro-f1", "exact-set", "pearson", "spearman"),
        *("exact-match", "bleu", "chrf", "rouge-l", "ter", "perplexity"),
    ]
    assert all(name == metric.name for name, metric in METRICS.items())
    assert {name for name, metric in METRICS.items() if not metric.higher_is_better} == {"ter", "perplexity"}


# --- classes -------------------------------------------------------------------------------------------------------


def test_accuracy() -> None:
    assert score("accuracy", ["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 75
    assert score("accuracy", ["a", "b"], ["a", "b"]) == 100


# true positives 4, false positives 2, false negatives 1, true negatives 3
PREDICTED = ["1"] * 4 + ["1"] * 2 + ["0"] * 1 + ["0"] * 3
EXPECTED = ["1"] * 4 + ["0"] * 2 + ["1"] * 1 + ["0"] * 3


def test_matthews_from_the_table() -> None:
    assert score("matthews", PREDICTED, EXPECTED) == pytest.approx(100 * (4 * 3 - 2 * 1) / math.sqrt(6 * 5 * 5 * 4))
    assert score("matthews", [1, 0, 1, 0], [0, 1, 0, 1]) == pytest.approx(-100)
    assert score("matthews", [1, 0, 1, 0], [1, 0, 1, 0]) == pytest.approx(100)


def test_matthews_of_three_classes() -> None:
    predicted, expected = list("aabbbccacb"), list("aabbaccccb")
    right, rows = sum(p == e for p, e in zip(predicted, expected, strict=True)), len(expected)
    p, e = Counter(predicted), Counter(expected)
    numerator = right * rows - sum(p[k] * e[k] for k in "abc")
    squares = [rows**2 - sum(count**2 for count in side.values()) for side in (p, e)]
    assert score("matthews", predicted, expected) == pytest.approx(100 * numerator / math.sqrt(math.prod(squares)))


def test_f1_of_two_classes_is_that_of_the_last() -> None:
    assert score("f1", PREDICTED, EXPECTED) == pytest.approx(100 * 2 * 4 / (2 * 4 + 2 + 1))
    as_numbers = [[int(label) for label in side] for side in (PREDICTED, EXPECTED)]
    assert score("f1", *as_numbers) == pytest.approx(100 * 2 * 4 / (2 * 4 + 2 + 1))
    # The class 0 has 3 true positives, 1 false positive and 2 false negatives.
    names = [[{"1": "a", "0": "b"}[label] for label in side] for side in (PREDICTED, EXPECTED)]
    assert score("f1", *names) == pytest.approx(100 * 2 * 3 / (2 * 3 + 1 + 2))
    assert score("f1", ["0", "0"], ["0", "1"]) == 0


def test_f1_of_more_classes_is_their_mean() -> None:
    # a: 2 of 3 found, none wrong; b: 2 of 2 found, 1 wrong; c and d: each taken for the other
    predicted, expected = list("abbbcda"), list("aabbdca")
    f1 = {"a": 2 * 2 / (2 * 2 + 0 + 1), "b": 2 * 2 / (2 * 2 + 1 + 0), "c": 0.0, "d": 0.0}
    assert score("f1", predicted, expected) == pytest.approx(100 * sum(f1.values()) / 4)
    assert score("f1", list("abc"), list("abc")) == pytest.approx(100)


@pytest.mark.parametrize("name", ["matthews", "f1"])
def test_many_classes_in_few_rows_are_no_reason_to_warn(name: str) -> None:
    classes = [f"class {i}" for i in range(30)]
    assert score(name, classes, classes) == pytest.approx(100)


# --- class lists ---------------------------------------------------------------------------------------------------


def test_the_scores_of_class_lists_are_scikit_learns() -> None:
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    predicted = [("a", "b"), ("a",), (), ("c",), ("a", "c"), ()]
    expected = [("a", "b"), ("b",), ("a",), ("c",), ("a", "b", "c"), ()]
    of = MultiLabelBinarizer(classes=["a", "b", "c"])
    sides = of.fit_transform(expected), of.transform(predicted)
    assert score("micro-f1", predicted, expected) == pytest.approx(100 * f1_score(*sides, average="micro"))
    assert score("exact-set", predicted, expected) == pytest.approx(100 * accuracy_score(*sides)) == 50
    assert score("micro-f1", [(), ()], [(), ()]) == 0


# --- numbers -------------------------------------------------------------------------------------------------------

FOUND = [0.1, 2.5, 2.5, 1.0, 4.0, -3.0, 2.5]
WANTED = [0.0, 2.0, 3.0, 2.0, 3.0, -1.0, 1.0]


def ranks(values: list[float]) -> list[float]:
    """Ranks: 1 for the smallest; equal values share the mean of their ranks."""
    return [sum(v < value for v in values) + (values.count(value) + 1) / 2 for value in values]


def test_correlations() -> None:
    assert score("pearson", FOUND, WANTED) == pytest.approx(100 * statistics.correlation(FOUND, WANTED))
    by_rank = statistics.correlation(ranks(FOUND), ranks(WANTED))
    assert score("spearman", FOUND, WANTED) == pytest.approx(100 * by_rank)
    assert score("spearman", [1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(100)
    assert score("spearman", [1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-100)


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_a_constant_correlates_with_nothing(name: str) -> None:
    constant, varied = ([0.1] * 3, [1.0, 2.0, 3.0]) if name != "matthews" else (["a"] * 3, ["a", "b", "a"])
    assert score(name, constant, varied) == 0
    assert score(name, varied, constant) == 0
    assert score(name, constant, constant) == 0


# --- texts ---------------------------------------------------------------------------------------------------------


def test_exact_match_with_any_reference() -> None:
    answers = [" yes ", '{"a": 1, "b": 2}', "no", "c"]
    assert score("exact-match", answers, [("no", "yes"), ('{"b":2,"a":1}',), ("yes", "maybe"), ("c", "d", "e")]) == 75


def bleu(answers: list[str], references: list[tuple[str, ...]]) -> float:
    """Papineni et al. (2002): clipped n-gram precisions, their geometric mean, and a penalty for too few words.

    An n-gram of an answer counts at most as often as in the reference that has it most often. The reference length is
    the one nearest to the answer's, the shorter of two. For texts without punctuation, with matches at all orders.
    """

    def grams(text: str, n: int) -> Counter[tuple[str, ...]]:
        words = text.split()
        return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    logs = 0.0
    for n in range(1, 5):
        hits = total = 0
        for answer, ones in zip(answers, references, strict=True):
            allowed: Counter[tuple[str, ...]] = Counter()
            for one in ones:
                allowed |= grams(one, n)
            hits += (grams(answer, n) & allowed).total()
            total += grams(answer, n).total()
        logs += math.log(hits / total)
    length = sum(len(answer.split()) for answer in answers)
    wanted = sum(
        min((abs(len(one.split()) - len(answer.split())), len(one.split())) for one in ones)[1]
        for answer, ones in zip(answers, references, strict=True)
    )
    return 100 * min(1.0, math.exp(1 - wanted / length)) * math.exp(logs / 4)


def test_bleu_from_counts() -> None:
    assert score("bleu", ANSWERS, REFERENCES) == pytest.approx(bleu(ANSWERS, REFERENCES))
    # Fewer words than the references (24 against 10 + 10 + 6), so the penalty acts.
    assert sum(map(len, map(str.split, ANSWERS))) == 24
    first = [ones[:1] for ones in REFERENCES]
    assert score("bleu", ANSWERS, first) == pytest.approx(bleu(ANSWERS, first))
    assert score("bleu", ANSWERS, first) < score("bleu", ANSWERS, REFERENCES)


def test_bleu_without_a_hit_at_some_orders_is_smoothed() -> None:
    # 3 of 5 words, 1 of 4 pairs, no triple of 3, no quadruple of 2: mteval's 1/2 and 1/4 stand in for the two zeros.
    precisions = [3 / 5, 1 / 4, (1 / 2) / 3, (1 / 4) / 2]
    assert score("bleu", ["a b x c y"], [("a b z z c",)]) == pytest.approx(100 * math.prod(precisions) ** 0.25)


def test_bleu_tokenizes_and_minds_case() -> None:
    assert score("bleu", ["Well, it costs $3.50 (net)."], [("Well , it costs $ 3.50 ( net ) .",)]) == pytest.approx(100)
    # One word of five in another case, at the end: 4/5, 3/4, 2/3, 1/2.
    assert score("bleu", ["a b c d E"], [("a b c d e",)]) == pytest.approx(100 * (1 / 5) ** 0.25)
    assert score("bleu", ["a b c"], [("a b c",)]) == 0  # no answer has four words


def test_chrf_by_hand() -> None:
    # "ab" of "abc": 2 of 2 and 2 of 3 letters; 1 of 1 and 1 of 2 pairs; no triple. P = 1, R = (2/3 + 1/2)/2 = 7/12.
    assert score("chrf", ["ab"], [("abc",)]) == pytest.approx(100 * 5 * (7 / 12) / (4 + 7 / 12))
    # And with "xy z" of "xyz", counts added first: R = (5/6 + 3/4 + 1/2)/3 = 25/36, P = 1.
    assert score("chrf", ["ab", "xy z"], [("abc",), ("xyz",)]) == pytest.approx(100 * 5 * (25 / 36) / (4 + 25 / 36))
    # Only the best reference counts.
    assert score("chrf", ["ab", "xy z"], [("q", "abc", "axxx"), ("xyz",)]) == pytest.approx(100 * 125 / 169)
    assert score("chrf", ["AB"], [("ab",)]) == 0


def rouge_l(answer: str, reference: str) -> float:
    a, b = answer.split(), reference.split()

    @cache
    def common(i: int, j: int) -> int:
        if i == len(a) or j == len(b):
            return 0
        return 1 + common(i + 1, j + 1) if a[i] == b[j] else max(common(i + 1, j), common(i, j + 1))

    return 2 * common(0, 0) / (len(a) + len(b))  # the harmonic mean of common/len(a) and common/len(b)


def test_rouge_l_by_its_definition() -> None:
    best = [max(rouge_l(a, one) for one in ones) for a, ones in zip(ANSWERS, REFERENCES, strict=True)]
    assert score("rouge-l", ANSWERS, REFERENCES) == pytest.approx(100 * sum(best) / 3)
    assert score("rouge-l", ["police killed the gunman"], [("the gunman police killed",)]) == pytest.approx(50)
    assert score("rouge-l", ["The CAT, sat!"], [("the cat sat",)]) == pytest.approx(100)
    assert score("rouge-l", ["he jumps"], [("he jumped",)]) == pytest.approx(50)  # no stemmer
    assert score("rouge-l", ["привет"], [("привет",)]) == 0  # as documented


@pytest.mark.parametrize(
    ("answers", "references", "edits", "words"),
    [
        (["a b x d e"], [("a b c d e",)], 1, 5),  # a word in place of another
        (["a b c"], [("a b c d e",)], 2, 5),  # two missing
        (["a b c d e f"], [("a b c d e",)], 1, 5),  # one too many
        (["d e a b c"], [("a b c d e",)], 1, 5),  # one phrase moved
        (["A B c d e"], [("a b c d e",)], 0, 5),  # case does not count
        (["a b x d e", "q"], [("a b c d e",), ("r s",)], 1 + 2, 5 + 2),
        (["a b c"], [("a b c d", "x a b c x x")], 1, (4 + 6) / 2),  # to the nearest reference, by the mean length
        (["a b c", "x y"], [("a b c d", "x a b c x x"), ("x y z",)], 1 + 1, (4 + 6) / 2 + 3),
    ],
)
def test_ter_of_known_edits(answers: list[str], references: list[tuple[str, ...]], edits: int, words: float) -> None:
    assert score("ter", answers, references) == pytest.approx(100 * edits / words)


@pytest.mark.parametrize("name", ["bleu", "chrf", "ter"])
def test_scores_are_those_of_the_command_sacrebleu(name: str, tmp_path: Path) -> None:
    answers = [
        "The cat, they say, sat on THE mat.",
        "It costs $3.50 (net) in the north",
        "Nothing at all is right here.",
    ]
    references = [
        ("The cat, it is said, sat on the mat.", "They say the cat was on the mat"),
        ("It costs $3.50 (net) in the North.", "In the north it is $3.50."),
        ("Everything is wrong.", "Nothing here is right at all."),
    ]
    files = {"answers": answers, "first": [one for one, _ in references], "second": [two for _, two in references]}
    for file, lines in files.items():
        (tmp_path / file).write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "sacrebleu", "first", "second", "-i", "answers", "-m", name, "-b", "-w", "10"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert score(name, answers, references) == pytest.approx(float(done.stdout), abs=1e-9)
    assert 0 < float(done.stdout) < 100


@pytest.mark.parametrize("name", ["exact-match", "bleu", "chrf", "rouge-l", "ter"])
def test_a_perfect_answer(name: str) -> None:
    # The right reference is the last of three, the only one, and the first of two.
    references = [("no", "a b", ANSWERS[0]), (ANSWERS[1],), (ANSWERS[2], "something else")]
    assert score(name, ANSWERS, references) == pytest.approx(0 if name == "ter" else 100)


# --- loss ----------------------------------------------------------------------------------------------------------


def test_perplexity() -> None:
    # Four tokens of probability 1/2, one of 1/8: (2·2·2·2·8)^(1/5). A mean of the rows' would be (2 + 8)/2.
    losses = [4 * math.log(2), math.log(8)]
    assert score("perplexity", losses, [4, 1]) == pytest.approx(2 ** (7 / 5))
    assert score("perplexity", [0.0], [3]) == 1
    assert score("perplexity", [1e6], [2]) == math.inf
    with pytest.raises(ValueError, match="the perplexity of no token"):
        score("perplexity", [0.0], [0])


# --- what does not fit ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(METRICS))
def test_no_rows_or_too_few(name: str) -> None:
    with pytest.raises(ValueError, match="a score of no rows"):
        score(name, [], [])
    one = {"classes": "a", "class lists": ("a",), "numbers": 1.0, "texts": ("a",), "loss": 1}[METRICS[name].of]
    with pytest.raises(ValueError, match="1 predictions for 2 rows"):
        score(name, ["a"] if METRICS[name].of != "loss" else [1.0], [one, one])


@pytest.mark.parametrize("name", [name for name, metric in METRICS.items() if metric.of == "texts"])
def test_a_question_without_reference(name: str) -> None:
    with pytest.raises(ValueError, match="question 2 has no reference"):
        score(name, ["a", "b"], [("a",), ()])


def test_default_metrics_fit_their_task() -> None:
    assert default_metrics("classification", False) == ("accuracy", "matthews")
    assert default_metrics("multi-label", False) == ("micro-f1", "exact-set")
    assert default_metrics("regression", False) == ("pearson", "spearman")
    assert default_metrics("causal-lm", True) == ("exact-match", "bleu", "chrf", "rouge-l", "perplexity")
    assert default_metrics("causal-lm", False) == ("perplexity",)
    tasks = ("classification", "multi-label", "regression", "causal-lm")
    for task, answers in [*((task, False) for task in tasks), ("causal-lm", True)]:
        names = default_metrics(task, answers)
        assert metrics_for(names, task, answers) == [METRICS[name] for name in names]
    with pytest.raises(ValueError, match="no metrics for the task 'images', only for: classification, multi-label, "):
        default_metrics("images", False)


@pytest.mark.parametrize(
    ("name", "task", "answers", "message"),
    [
        (
            "acuracy",
            "classification",
            False,
            "unknown metric 'acuracy'. Did you mean 'accuracy'? This task has: accuracy,",
        ),
        ("bogus", "regression", False, "unknown metric 'bogus'. This task has: pearson, spearman."),
        (
            "accuracy",
            "regression",
            False,
            "accuracy is for classes; this task is regression. It has: pearson, spearman.",
        ),
        (
            "pearson",
            "causal-lm",
            True,
            "pearson is for numbers; this task is causal-lm. It has: exact-match, bleu, chrf,",
        ),
        ("bleu", "causal-lm", False, "bleu is for texts; this task is causal-lm without prompts. It has: perplexity."),
        (
            "perplexity",
            "classification",
            True,
            "perplexity is for loss; this task is classification. It has: accuracy,",
        ),
    ],
)
def test_metrics_that_do_not_fit(name: str, task: str, answers: bool, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        metrics_for([*default_metrics(task, answers), name], task, answers)


def test_the_libraries_are_imported_when_they_are_used() -> None:
    script = (
        "import sys, lorakit.training.scores;"
        "sys.exit(any(name in sys.modules for name in ('sacrebleu', 'rouge_score', 'nltk', 'sklearn', 'scipy')))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_bleu_of_a_tokenized_corpus_says_nothing_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """E2E's sentences end in " .": sacrebleu would warn of it for every score, with the same result."""
    sentences = [f"The place {number} is near the river ." for number in range(200)]
    assert METRICS["bleu"].score(sentences, [(sentence,) for sentence in sentences]) == pytest.approx(100)
    assert caplog.records == []


PERFECT: dict[str, tuple[Any, Any]] = {
    "classes": (["a", "b", "c", "a"], ["a", "b", "c", "a"]),
    "class lists": ([("a", "b"), (), ("b",)], [("a", "b"), (), ("b",)]),
    "numbers": ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]),
    "texts": (["one two three four five"] * 2, [("one two three four five",)] * 2),
    "loss": ([0.0, 0.0], [3, 4]),
}


@pytest.mark.parametrize("name", METRICS)
def test_what_is_all_right_reaches_the_bound_of_the_score(name: str) -> None:
    metric = METRICS[name]
    assert metric.score(*PERFECT[metric.of]) == pytest.approx(bounds_of(name)[metric.higher_is_better])


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_what_is_all_wrong_reaches_the_other_bound_of_a_correlation(name: str) -> None:
    predicted, expected = (["a", "b"], ["b", "a"]) if name == "matthews" else ([1.0, 2.0, 3.0], [3.0, 2.0, 1.0])
    assert METRICS[name].score(predicted, expected) == pytest.approx(bounds_of(name)[0])
    assert bounds_of("one of another program") == (None, None)
