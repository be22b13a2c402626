"""What --class-weights asks for: scikit-learn's balanced weights, numbers by name, and errors that name the word."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from adapters import labelled_rows, write_rows
from lorakit.cli.main import main
from lorakit.training.class_weights import class_weights
from lorakit.training.data import Data, Example, read_data


def rows_of(labels: list[Any], task: str = "classification") -> Data:
    names = tuple(sorted(set(labels)))
    return Data("text+label", task, [Example("", text="a", label=label) for label in labels], [], [], names)


@pytest.mark.parametrize("labels", [["no"] * 9 + ["yes"], list("aabbbcccccc"), ["b", "a"]])
def test_balanced_weights_are_scikit_learns(labels: list[str]) -> None:
    data = rows_of(labels)
    expected = compute_class_weight("balanced", classes=np.unique(labels), y=np.array(labels))
    assert class_weights("balanced", data) == pytest.approx(tuple(expected))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        ("b=3", (1.0, 3.0, 1.0)),
        ("a=0.5, c=2", (0.5, 1.0, 2.0)),
        ("c=1e1,a=2,b=3", (2.0, 3.0, 10.0)),
    ],
)
def test_a_class_that_is_not_named_has_the_weight_one(asked: str | None, expected: tuple[float, ...] | None) -> None:
    assert class_weights(asked, rows_of(["a", "b", "c"])) == expected


def test_a_name_may_hold_commas_and_equals_signs() -> None:
    data = rows_of(["x=y", "red, green", "z"])
    assert class_weights("red, green=2,x=y=3", data) == (2.0, 3.0, 1.0)


@pytest.mark.parametrize(
    ("asked", "task", "message"),
    [
        ("d=2", "classification", r"no class 'd'; found: apple, berry\."),
        ("aple=2", "classification", r"no class 'aple'.* Did you mean 'apple'\?"),
        ("apple", "classification", r"'apple': expected balanced, or CLASS=WEIGHT"),
        ("", "classification", r"'': expected balanced, or CLASS=WEIGHT"),
        ("apple=2,berry", "classification", r"'apple=2,berry': expected balanced, or CLASS=WEIGHT"),
        ("apple=0", "classification", r"the weight of 'apple' is '0', expected a number above 0"),
        ("apple=inf", "classification", r"the weight of 'apple' is 'inf', expected a number above 0"),
        ("apple=much", "classification", r"the weight of 'apple' is 'much', expected a number above 0"),
        ("apple=1,apple=2", "classification", r"'apple' has two weights, 1 and 2"),
        ("balanced", "regression", r"rows that have one class each; these are for regression"),
        ("balanced", "causal-lm", r"rows that have one class each; these are for causal-lm"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: str, task: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        class_weights(asked, rows_of(["apple", "berry"], task))


def test_balanced_weights_need_a_row_of_each_class() -> None:
    data = Data("text+label", "classification", [Example("", text="a", label="a")], [], [], ("a", "b"))
    with pytest.raises(ValueError, match="balanced: no training row has the class 'b'"):
        class_weights("balanced", data)


@pytest.mark.parametrize(
    "words", [["--class-weights", "on=2.5,off=1"], ["--class-weights", "on=2.5", "--class-weights", "off=1"], []]
)
def test_check_tells_the_weights_of_the_classes(
    words: list[str], tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = labelled_rows(tmp_path / "d.jsonl", ["on", "off"] * 4)
    settings = tmp_path / "c.yaml"
    settings.write_text("class_weights:\n  'on': 2.5\n  'off': 1\n")
    more = words or ["--config", str(settings)]
    assert main(["check", "--model", str(tiny_encoder), "--data", str(data), *more]) == 0
    assert "weights of the classes in the loss: off 1, on 2.5\n" in capsys.readouterr().out
    assert read_data(str(data)).labels == ("off", "on")


@pytest.mark.parametrize(("weight", "expected"), [(1, 1 / (1 + 7)), (20, 20 / (20 + 7))])
def test_training_learns_the_weighted_share_of_a_class(
    weight: int, expected: float, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal texts, one in eight of them with the class rare: the loss is least where p is its share of the weights."""
    rows = [{"text": "turn it", "label": "rare" if i % 8 == 0 else "usual"} for i in range(16)]
    data, out = write_rows(tmp_path / "d.jsonl", rows), str(tmp_path / "out")
    words = ["--model", str(tiny_encoder), "--data", str(data), "-o", out, "--holdout", "0", "--lr", "0.01"]
    words += ["--epochs", "10", "--dtype", "float32", "--class-weights", f"rare={weight}"]
    assert main(["train", *words]) == 0
    capsys.readouterr()
    assert main(["generate", "--model", out, "--prompt", "turn it", "--dtype", "float32"]) == 0
    shares = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(shares["rare"].rstrip("%")) / 100 == pytest.approx(expected, abs=0.05)
