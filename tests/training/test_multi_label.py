"""Multi-label classifiers, from rows to a merged model, compared with torch, transformers and scikit-learn."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score

import lorakit
from adapters import write_rows
from lorakit.cli.main import main
from lorakit.training.data import read_data
from lorakit.training.task import Task, model_task

TEXTS = ("turn the light on", "turn the light off", "is it on", "go")
SETS: tuple[list[str], ...] = (["light", "on"], ["light"], ["on"], [])


def labelled(path: Path, labels: list[Any]) -> Path:
    return write_rows(path, [{"text": f"turn {i}", "label": label} for i, label in enumerate(labels)])


def said(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    capsys.readouterr()
    found = main([str(word) for word in words])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed.err if code else printed.out


# --- rows ---


def test_lists_of_classes_make_a_multi_label_task(tmp_path: Path) -> None:
    data = read_data(str(labelled(tmp_path / "d.jsonl", [["b", "a"], [], [" c "], [3, True]])), holdout=0.0)
    assert (data.task, data.labels) == ("multi-label", ("3", "a", "b", "c", "true"))
    assert [row.label for row in data.train] == [("a", "b"), (), ("c",), ("3", "true")]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["a"], "b", []], r"d\.jsonl:2: the label 'b' is no list, and other rows have lists"),
        ([["a"], [], 1], r"d\.jsonl:3: the label '1' is no list"),
        (["a", ["b"], "c"], r"d\.jsonl:2: the label is a list, and most rows have a class or a number"),
        ([["a"], ["b", 1.5]], r"d\.jsonl:2: label is \['b', 1\.5\], expected a list of classes"),
        ([["a"], [["b"]]], r"d\.jsonl:2: label is \[\['b'\]\], expected a list of classes"),
        ([["a"], [None]], r"d\.jsonl:2: label is null"),
        ([["a"], [""]], r"d\.jsonl:2: label is empty"),
        ([["a"], ["b", "b"]], r"d\.jsonl:2: label is \['b', 'b'\], which names a class twice"),
        ([["a"], {"b": 1}], r"d\.jsonl:2: label is an object, expected a class, a list of classes or a number"),
        ([["b", "a"], ["a", "b"]], r"all rows of the training split have the label \['a', 'b'\]"),
        ([[], []], r"all rows of the training split have the label \[\]"),
    ],
)
def test_wrong_labels_are_refused_with_their_place(labels: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_data(str(labelled(tmp_path / "d.jsonl", labels)))


def test_a_class_that_training_rows_lack_is_refused(tmp_path: Path) -> None:
    labelled(tmp_path / "train.jsonl", [["a"], []])
    labelled(tmp_path / "test.jsonl", [["a"], ["a", "b"]])
    with pytest.raises(ValueError, match=r"test\.jsonl:2: the label 'b' does not occur in train"):
        read_data(str(tmp_path))


def test_another_task_does_not_take_lists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"d\.jsonl:1: the label is a list .* --task regression does not take"):
        read_data(str(labelled(tmp_path / "d.jsonl", [["a"], []])), task="regression")


# --- an adapter and a merged model ---


@pytest.fixture(scope="module")
def trained(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    rows = [{"text": TEXTS[i % 4], "label": SETS[i % 4]} for i in range(24)]
    write_rows(folder / "d.jsonl", rows)
    words = ["--model", str(tiny_encoder), "--data", str(folder / "d.jsonl"), "-o", str(folder / "out")]
    words += ["--epochs", "2", "--lr", "0.01", "--holdout", "0.25", "--dtype", "float32"]
    assert main(["train", *words, "--gradient-accumulation-steps", "2"]) == 0
    assert main(["merge", "--model", str(folder / "out"), "-o", str(folder / "merged"), "--dtype", "float32"]) == 0
    return folder


def probabilities(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    return torch.stack(logits).sigmoid()


@pytest.fixture(scope="module")
def theirs(trained: Path, tiny_encoder: Path) -> torch.Tensor:
    """Of each text the probability of light and of on, by transformers with the adapter."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=2, dtype=torch.float32)
    lorakit.load(model, trained / "out")
    return probabilities(model.eval(), AutoTokenizer.from_pretrained(tiny_encoder))


def test_the_folders_say_what_they_are(trained: Path, theirs: torch.Tensor) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    said = json.loads((trained / "out" / "labels.json").read_text())
    assert said == {"problem_type": "multi_label_classification", "labels": ["light", "on"]}
    expected = Task("multi-label", ("light", "on"))
    assert model_task(None, str(trained / "out")) == expected
    assert model_task(str(trained / "merged"), None) == expected
    merged = AutoModelForSequenceClassification.from_pretrained(trained / "merged")
    assert merged.config.problem_type == "multi_label_classification"
    assert merged.config.id2label == {0: "light", 1: "on"}
    found = probabilities(merged.eval(), AutoTokenizer.from_pretrained(trained / "merged"))
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["out", "merged"])
def test_generate_lists_the_classes_of_at_least_one_half(
    name: str, trained: Path, theirs: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, row in zip(TEXTS, theirs.tolist(), strict=True):
        printed = said(capsys, "generate", "--model", trained / name, "--prompt", text, "--dtype", "float32")
        found = dict(re.findall(r"^(\S+) +([\d.]+)%$", printed, re.MULTILINE))
        expected = {label: 100 * p for label, p in zip(("light", "on"), row, strict=True) if p >= 0.5}
        assert {label: float(share) for label, share in found.items()} == pytest.approx(expected, abs=0.06)
        assert ("no class (the likeliest: " in printed) == (not expected)


@pytest.mark.parametrize("name", ["out", "merged"])
def test_eval_gives_micro_f1_and_the_share_of_right_sets(
    name: str, trained: Path, theirs: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against labels that the model does not all predict: for text 3 the other classes than those it gives."""
    predicted = (theirs >= 0.5).int()
    expected = predicted.clone()
    expected[3] = 1 - expected[3]
    expected[0, 0] = 1 - expected[0, 0]
    labels = [[label for label, on in zip(("light", "on"), row, strict=True) if on] for row in expected.tolist()]
    data = write_rows(tmp_path / "d.jsonl", [{"text": t, "label": own} for t, own in zip(TEXTS, labels, strict=True)])
    words = ["eval", "--model", trained / name, "--data", data, "--dtype", "float32", "--json", tmp_path / "s.json"]
    printed = said(capsys, *words)
    assert "micro-F1" in printed and "exact set match" in printed
    metrics = json.loads((tmp_path / "s.json").read_text())["metrics"]
    f1 = f1_score(expected.numpy(), predicted.numpy(), average="micro", zero_division=0.0)
    assert metrics["micro-F1"][1] == pytest.approx(f1)
    assert metrics["exact set match"][1] == accuracy_score(expected.numpy(), predicted.numpy()) == 0.5


def test_eval_refuses_labels_that_the_model_does_not_have(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = labelled(tmp_path / "d.jsonl", [["light"], ["ligth"]])
    err = said(capsys, "eval", "--model", trained / "out", "--data", data, code=1)
    assert "d.jsonl:2: 'ligth' is no class of this model" in err and "Did you mean 'light'?" in err
    data = labelled(tmp_path / "e.jsonl", ["light", "on"])
    err = said(capsys, "eval", "--model", trained / "out", "--data", data, code=1)
    assert "e.jsonl:1: the label 'light' is no list, and this is a multi-label classifier (light, on)" in err


def test_a_run_goes_on_with_a_multi_label_adapter(
    trained: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_encoder, "--data", trained / "d.jsonl", "-o", tmp_path / "more", "--dtype", "float32"]
    printed = said(capsys, "train", *words, "--from", trained / "out", "--max-steps", "1", "--holdout", "0")
    assert "predicts: any number of: light, on" in printed
    assert (tmp_path / "more" / "labels.json").read_bytes() == (trained / "out" / "labels.json").read_bytes()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--class-weights", "balanced"], "rows that have one class each; these are for multi-label"),
        (["--metric", "accuracy"], "accuracy is for classes; this task is multi-label. It has: micro-f1, exact-set."),
    ],
)
def test_what_multi_label_rows_do_not_take(
    more: list[str], message: str, trained: Path, tiny_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in said(capsys, "check", "--model", tiny_encoder, "--data", trained / "d.jsonl", *more, code=1)


def test_a_run_is_judged_by_the_scores_that_eval_gives(
    trained: Path, tiny_encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", tiny_encoder, "--data", trained / "d.jsonl", "-o", tmp_path / "out", "--dtype", "float32"]
    words += ["--epochs", "1", "--holdout", "0.25", "--metric", "micro-f1", "--lr", "0.01"]
    said(capsys, "train", *words)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    judged = [line["eval_micro_f1"] for line in lines if "eval_micro_f1" in line]
    scores = json.loads((tmp_path / "out" / "results.json").read_text())["scores"]
    assert judged and judged[-1] == pytest.approx(100 * scores["micro-F1"]["adapter"])
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'num_labels=2, problem_type="multi_label_classification"' in card


@pytest.mark.parametrize("text", ['{"problem_type": "x", "labels": ["a"]}', '{"labels": []}'])
def test_a_broken_labels_file_is_named(text: str, tiny_encoder: Path, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes((trained / "out" / "adapter_config.json").read_bytes())
    (tmp_path / "labels.json").write_text(text)
    with pytest.raises(ValueError, match=r"labels\.json: expected a list of names, or for a multi-label classifier"):
        model_task(str(tiny_encoder), str(tmp_path))
