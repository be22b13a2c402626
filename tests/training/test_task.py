"""The adapter decides what a model is for; the scored rows do not."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from adapters import classifier_adapter, labelled_rows, language_adapter
from lorakit.training.adapter_folder import base_and_adapter
from lorakit.training.data import read_data
from lorakit.training.evaluate import evaluate
from lorakit.training.models import load_with_adapter
from lorakit.training.style import Style
from lorakit.training.task import Task, model_task

CLASSES = ("apple", "berry", "cherry")


@pytest.fixture(scope="module")
def fruits(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_adapter(tiny_encoder, tmp_path_factory.mktemp("task") / "fruits", CLASSES, always=1)


@pytest.fixture(scope="module")
def marks(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose classes are whole numbers, not from 0 and not in alphabetical order."""
    return classifier_adapter(tiny_encoder, tmp_path_factory.mktemp("task") / "marks", ("2", "3", "10"), always=2)


@pytest.fixture(scope="module")
def truths(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_adapter(tiny_encoder, tmp_path_factory.mktemp("task") / "truths", ("false", "true"), always=1)


@pytest.fixture(scope="module")
def numbers(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_adapter(tiny_encoder, tmp_path_factory.mktemp("task") / "numbers", (), value=2.5)


def score(adapter: Path, data: Path) -> tuple[str, float]:
    task = model_task(*base_and_adapter(str(adapter), None))
    rows = read_data(str(data), holdout=0.0, model=task)
    loaded = load_with_adapter(str(adapter), None, dtype="float32")
    result = evaluate(loaded, rows, "train", rows.train, Style(chat=False), max_length=64)
    ((name, (_, after)),) = result.metrics.items()
    return name, after


# Each adapter says the same to every text, so the accuracy is that answer's share of the labels.
@pytest.mark.parametrize(
    ("adapter", "labels", "expected"),
    [
        ("fruits", ["apple", "berry", "cherry"], 1 / 3),
        ("fruits", ["cherry", "berry", "apple", "berry"], 1 / 2),
        ("fruits", ["berry", "cherry"], 1 / 2),
        ("fruits", ["apple", "cherry"], 0.0),
        ("fruits", ["berry"], 1.0),
        ("fruits", ["cherry", "cherry", "cherry"], 0.0),
        ("marks", [10, 2], 1 / 2),
        ("marks", [10.0, 10, 3], 2 / 3),
        ("marks", ["10", "10.0"], 1.0),
        ("marks", [10], 1.0),
        ("truths", [True, False], 1 / 2),
        ("truths", ["True", "FALSE", "true"], 2 / 3),
        ("truths", [True], 1.0),
    ],
)
def test_accuracy_depends_on_no_class_that_the_file_lacks(
    adapter: str, labels: list[Any], expected: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    metric, found = score(request.getfixturevalue(adapter), labelled_rows(tmp_path / "d.jsonl", labels))
    assert metric == "accuracy" and found == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[1, 2, 3, 4, 5], [1, 1, 5], [4], ["1", "2.5"]])
def test_an_adapter_that_predicts_numbers_is_scored_by_them(labels: list[Any], numbers: Path, tmp_path: Path) -> None:
    assert score(numbers, labelled_rows(tmp_path / "d.jsonl", labels))[0] == "pearson"


@pytest.mark.parametrize(
    ("adapter", "labels", "message"),
    [
        ("fruits", ["apple", "durian"], r"d\.jsonl:2: 'durian' is no class of this model\. .*apple, berry, cherry"),
        ("fruits", ["bery"], r"d\.jsonl:1: 'bery' is no class .* Did you mean 'berry'\?"),
        ("fruits", ["x", "y", "x"], r"(?s)2 bad rows.*:1: 'x' is .*\(2 rows have it\).*:2: 'y' is"),
        ("fruits", [0, 1], r"d\.jsonl:1: '0' is no class"),
        ("fruits", [True], r"d\.jsonl:1: 'true' is no class"),
        ("marks", [1, 10], r"d\.jsonl:1: '1' is no class .*2, 3, 10"),
        ("marks", [2.5], r"d\.jsonl:1: '2\.5' is no class"),
        ("numbers", [1, "good"], r"d\.jsonl:2: the label 'good' is not a number"),
    ],
)
def test_an_unknown_label_is_named_with_its_place_and_the_classes(
    adapter: str, labels: list[Any], message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(ValueError, match=message):
        score(request.getfixturevalue(adapter), labelled_rows(tmp_path / "d.jsonl", labels))


def made_by_peft(base: Path, folder: Path, count: int, names: tuple[str, ...] = ()) -> Path:
    """PEFT's adapter of a classifier on `base`, and the base in `folder`/base, with class names if given."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shutil.copytree(base, folder / "base")
    if names:
        config = AutoConfig.from_pretrained(base, id2label=dict(enumerate(names)))
        config.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=count)
        settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
        live = peft.get_peft_model(model, settings)
        head = live.base_model.model.classifier.modules_to_save["default"]
        with torch.no_grad():
            head.weight.mul_(0.01)
            head.bias.zero_()
            head.bias[-1] = 5.0
        live.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.mark.parametrize(
    ("count", "names", "expected"),
    [
        (3, (), Task("classification", ("0", "1", "2"), named=False)),
        (2, (), Task("classification", ("0", "1"), named=False)),
        (3, ("a", "b", "c"), Task("classification", ("a", "b", "c"))),
        (4, ("a", "b", "c"), Task("classification", ("0", "1", "2", "3"), named=False)),
        (40, (), Task("classification", tuple(map(str, range(40))), named=False)),  # more classes than the width
        (1, (), Task("regression")),
    ],
)
def test_the_rows_of_a_head_tell_the_classes_where_no_file_names_them(
    count: int, names: tuple[str, ...], expected: Task, tiny_encoder: Path, tmp_path: Path
) -> None:
    adapter = made_by_peft(tiny_encoder, tmp_path, count, names)
    assert model_task(*base_and_adapter(str(adapter), None)) == expected


@pytest.mark.parametrize("labels", [["a", "b", "c", "c"], [0, 1, 2, 2], ["2", "2", "0", "1"]])
def test_classes_without_names_are_called_as_the_rows_call_them(
    labels: list[Any], tiny_encoder: Path, tmp_path: Path
) -> None:
    adapter = made_by_peft(tiny_encoder, tmp_path, 3)
    assert score(adapter, labelled_rows(tmp_path / "d.jsonl", labels)) == ("accuracy", 0.5)
    with pytest.raises(ValueError, match=r"d\.jsonl:1: 'x' is no class .* 0, 1, 2\. No file names them"):
        score(adapter, labelled_rows(tmp_path / "d.jsonl", ["x", "y"]))


def test_a_head_that_is_adapted_and_the_names_of_a_base_that_is_a_classifier(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    import lorakit
    from lorakit.training.models import load_classifier

    base = tmp_path / "base"
    named = load_classifier(str(tiny_encoder), labels=("no", "yes"), dtype="float32")
    named.model.save_pretrained(base)
    named.tokenizer.save_pretrained(base)
    assert model_task(str(base), None) == Task("classification", ("no", "yes"))
    lorakit.attach(named.model, ["query", "classifier"], rank=2)
    lorakit.save(named.model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    for kind in ("SEQ_CLS", None):
        config["task_type"] = kind
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
        assert model_task(str(base), str(tmp_path / "adapter")) == Task("classification", ("no", "yes"))


def test_a_language_model_is_one_whatever_lies_beside_it(tiny_lm: Path, tmp_path: Path) -> None:
    adapter = language_adapter(tiny_lm, tmp_path / "adapter")
    assert model_task(str(tiny_lm), None) == Task("causal-lm")
    (adapter / "labels.json").write_text('["stale", "names"]')
    assert model_task(str(tiny_lm), str(adapter)) == Task("causal-lm")
    with pytest.raises(ValueError, match=r"d\.jsonl:1: a row with a label, but the model is no classifier"):
        read_data(str(labelled_rows(tmp_path / "d.jsonl", ["a", "b"])), model=Task("causal-lm"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 0}', r"labels\.json: expected a list"),
        ("[0, 1]", r"labels\.json: expected a list of different names"),
        ('["a", "a"]', r"labels\.json: expected a list of different names"),
        ('["a", ', r"labels\.json:1: not JSON"),
    ],
)
def test_a_broken_file_of_names_is_named(
    text: str, message: str, fruits: Path, tiny_encoder: Path, tmp_path: Path
) -> None:
    shutil.copytree(fruits, tmp_path / "adapter")
    (tmp_path / "adapter" / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        model_task(str(tiny_encoder), str(tmp_path / "adapter"))


def test_tasks_without_a_verb_are_refused_by_name(fruits: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    shutil.copytree(fruits, tmp_path / "adapter")
    config = json.loads((fruits / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(ValueError, match="task_type is TOKEN_CLS"):
        model_task(str(tiny_encoder), str(tmp_path / "adapter"))
