"""The data of the experiments: parsed lines, drawn splits, images and the network, on bytes written here."""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from experiments import prepare, vision
from safetensors.torch import save_file

from lorakit.study.comparison.config import config_of, tasks_of


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_rated_sentence_is_its_text_and_its_rating() -> None:
    line = b"12\t-2.26666666667\tCaf\xc3\xa9 &amp; bar:  &quot;awful&quot;, they\tsay "
    assert prepare.rated_of(line.decode()) == ('Café & bar: "awful", they say', -2.26666666667)


@pytest.mark.parametrize("line", ["1\t0.5", "1\tgood\tText", ""])
def test_what_is_no_rated_sentence_is_shown(line: str) -> None:
    with pytest.raises(prepare.Problem, match="is not an id, a rating and a text"):
        prepare.rated_of(line)


def test_texts_that_differ_in_case_alone_are_one_with_the_mean_rating() -> None:
    rated = [("Great PLAYER.", 3.0), ("Why?", -0.1), ("great player.", 2.0), ("Great player!", 1.0)]
    assert prepare.distinct(rated) == [("Great PLAYER.", 2.5), ("Why?", -0.1), ("Great player!", 1.0)]


def test_the_label_is_the_sign_of_a_rating_that_is_not_near_zero() -> None:
    labels = [prepare.sentiment(rating) for rating in (-4.0, -0.5, -0.49, 0.0, 0.49, 0.5, 3.9)]
    assert labels == ["negative", "negative", None, None, None, "positive", "positive"]


def test_splits_are_disjoint_complete_drawn_and_the_same_each_time() -> None:
    rows = list(range(100))
    splits = prepare.drawn(rows, {"valid": 10, "test": 20})
    assert {name: len(own) for name, own in splits.items()} == {"train": 70, "valid": 10, "test": 20}
    assert sorted(splits["train"] + splits["valid"] + splits["test"]) == rows
    assert splits["valid"] != rows[:10] and splits["train"] != sorted(splits["train"])
    assert splits == prepare.drawn(rows, {"valid": 10, "test": 20})


def test_a_sentence_task_is_written_without_neutral_rows_and_the_rating_task_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rated = [(f"text {number}", number / 10 - 2) for number in range(41)]  # −2.0 … 2.0
    monkeypatch.setattr(prepare, "rated_sentences", lambda: {"movie": rated})
    monkeypatch.setattr(prepare, "VALID", 5)
    monkeypatch.setattr(prepare, "TEST", 8)
    prepare.write_sentiments(tmp_path)
    rows = {split: rows_of(tmp_path / "movie" / f"{split}.jsonl") for split in ("train", "valid", "test")}
    assert {split: len(own) for split, own in rows.items()} == {"train": 19, "valid": 5, "test": 8}  # 32 with a label
    said = {row["text"]: row["label"] for own in rows.values() for row in own}
    assert said == {text: "positive" if rating > 0 else "negative" for text, rating in rated if abs(rating) > 0.45}

    (tmp_path / "rating").mkdir()
    prepare.write_ratings(tmp_path / "rating")
    written = [row for path in (tmp_path / "rating/movie").iterdir() for row in rows_of(path)]
    assert sorted((row["text"], row["label"]) for row in written) == sorted(rated)


def test_a_line_of_e2e_is_the_linearised_prompt_and_the_sentence() -> None:
    line = "name : Blue Spice | Type : coffee shop | area : city centre||A coffee shop called Blue Spice . "
    assert prepare.pair_of(line) == {
        "prompt": "name : Blue Spice | Type : coffee shop | area : city centre",
        "completion": "A coffee shop called Blue Spice .",
    }


@pytest.mark.parametrize("line", ["name : Blue Spice", "name : X||  ", "name[X], eatType[pub]||A pub .", "||A pub ."])
def test_what_is_no_line_of_e2e_is_shown(line: str) -> None:
    with pytest.raises(prepare.Problem, match="is no line 'name : … | Type : …||sentence'"):
        prepare.pair_of(line)


def write_source(folder: Path) -> None:
    """20 prompts with one to three sentences each, 39 rows; and two rows of another prompt for the test."""
    folder.mkdir()
    lines = [
        f"name : N{number} | Type : pub||Sentence {index} of N{number} ."
        for number in range(20)
        for index in range(number % 3 + 1)
    ]
    (folder / "valid.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "test.txt").write_text("name : Zoë||One .\nname : Zoë||Two .\n", encoding="utf-8")


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to write to, in place of the repository's, and sizes that fit `write_source`."""
    monkeypatch.setattr(prepare, "DATA", tmp_path / "data")
    monkeypatch.setattr(prepare, "HELD_OUT", 4)
    monkeypatch.setattr(prepare, "E2E_ROWS", {"valid.txt": 39, "test.txt": 2})
    return tmp_path / "data"


def test_e2e_is_split_by_prompts_and_written_once(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_source(tmp_path / "source")
    assert prepare.main(["e2e", str(tmp_path / "source")]) == 0
    rows = {split: rows_of(prepared / "e2e" / f"{split}.jsonl") for split in ("train", "valid", "test")}
    prompts = {split: {row["prompt"] for row in own} for split, own in rows.items()}
    assert {split: len(own) for split, own in prompts.items()} == {"train": 16, "valid": 4, "test": 1}
    assert not prompts["train"] & prompts["valid"]
    assert len(rows["train"]) + len(rows["valid"]) == 39  # all sentences of a prompt go with it
    assert rows["test"] == [{"prompt": "name : Zoë", "completion": word} for word in ("One .", "Two .")]
    assert [path.name for path in prepared.iterdir()] == ["e2e"]
    printed = capsys.readouterr().out
    assert "e2e: written" in printed and "2 rows, 1 prompts" in printed

    (tmp_path / "source/valid.txt").unlink()  # not read again
    assert prepare.main(["e2e", str(tmp_path / "source")]) == 0
    assert capsys.readouterr().out == printed.replace("written", "is there")


def test_a_missing_or_different_file_leaves_nothing_behind_and_is_told_in_one_line(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main(["e2e", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("e2e: there is no ") and error.count("\n") == 1
    write_source(tmp_path / "source")
    (tmp_path / "source/test.txt").write_text("name : X||One .\n", encoding="utf-8")
    assert prepare.main(["e2e", str(tmp_path / "source")]) == 1
    assert capsys.readouterr().err == "e2e: test.txt: 1 found, 2 expected.\n"
    assert list(prepared.iterdir()) == []


def test_words_name_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(prepare.parts_of([])) == ["vader", "e2e", "images", "models"]
    assert prepare.parts_of(["e2e", "models"]) == {"e2e": Path("data/e2e"), "models": Path("data/e2e")}
    assert prepare.parts_of(["vader", "e2e", "texts"])["e2e"] == Path("texts")
    assert prepare.main(["vader", "texts"]) == 2
    assert capsys.readouterr().err == "unknown word 'texts': expected [vader] [e2e [FOLDER]] [images] [models].\n"


def test_idx_files_are_read_by_their_sizes() -> None:
    content = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 10, 11, 12, 20, 21, 255])
    assert prepare.idx(gzip.compress(content)).tolist() == [[[10, 11, 12]], [[20, 21, 255]]]
    with pytest.raises(prepare.Problem, match="begin with 00 00 08, not with 00 00 0d"):
        prepare.idx(gzip.compress(b"\x00\x00\x0d" + content[3:]))


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """50 images for training and 20 for the test, each identified by its first pixel; label: the number modulo 10."""
    monkeypatch.setattr(vision, "DATA", tmp_path)
    (tmp_path / "images/fashion").mkdir(parents=True)
    for split, first, count in (("train", 0, 50), ("test", 200, 20)):
        pixels = np.zeros((count, 28, 28), np.uint8)
        pixels[:, 0, 0] = np.arange(first, first + count)
        labels = (np.arange(count) % 10).astype(np.uint8)
        prepare.write_images(tmp_path / f"images/fashion/{split}.safetensors", pixels, labels)


def numbers(images: vision.Images) -> list[int]:
    return [round((value + 1) * 127.5) for value in images.pixels[:, 0, 0, 0].tolist()]


@pytest.mark.usefixtures("fashion")
def test_images_are_scaled_and_drawn_by_the_seed() -> None:
    splits = vision.clothes(30, 20, 10, seed=1)
    assert splits["train"].pixels.shape == (30, 1, 28, 28)
    assert splits["train"].pixels[:, 0, 1].unique().tolist() == [-1.0]
    assert sorted(numbers(splits["train"]) + numbers(splits["valid"])) == list(range(50))
    for images in splits.values():
        assert images.labels.tolist() == [number % 10 for number in numbers(images)]
    again, other = vision.clothes(30, 20, 10, seed=1), vision.clothes(30, 20, 10, seed=2)
    assert numbers(splits["train"]) == numbers(again["train"]) != numbers(other["train"])
    assert numbers(splits["test"]) == numbers(other["test"])
    assert set(numbers(splits["test"])) < set(range(200, 220))


def test_without_images_or_weights_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "DATA", tmp_path)
    monkeypatch.setattr(vision, "WEIGHTS", tmp_path / "digits.safetensors")
    with pytest.raises(FileNotFoundError, match="run python benchmarks/experiments/prepare.py images"):
        vision.read("mnist", "train")
    with pytest.raises(FileNotFoundError, match="run python benchmarks/experiments/vision.py"):
        vision.pretrained()


def bright_or_dark(count: int) -> vision.Images:
    """Noise with class 1 brighter than class 0."""
    labels = torch.arange(count) % 2
    return vision.Images(torch.randn(count, 1, 28, 28) * 0.3 + (labels - 0.5).view(-1, 1, 1, 1), labels)


def test_the_network_learns_and_comes_back_with_a_new_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vision, "WEIGHTS", tmp_path / "digits.safetensors")
    model = vision.ConvNet()
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    vision.train(model, bright_or_dark(3 * vision.BATCH), 3, 2e-3)
    assert vision.accuracy(model, bright_or_dark(40)) == 1.0

    save_file(model.state_dict(), vision.WEIGHTS)
    state = torch.get_rng_state()
    one, same, other = vision.pretrained(4, seed=1), vision.pretrained(4, seed=1), vision.pretrained(4, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.training and one.head.weight.shape == (4, 96)
    assert torch.equal(one.head.weight, same.head.weight) and not torch.equal(one.head.weight, other.head.weight)
    x = torch.randn(2, 1, 28, 28)
    torch.testing.assert_close(one.features(x), model.features(x), rtol=0, atol=0)


@pytest.mark.parametrize("path", sorted(vision.DATA.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_experiment_names_methods_and_folders_that_there_are(path: Path) -> None:
    config = config_of(argparse.Namespace(config=str(path)))
    tasks = tasks_of(config)  # names every method rightly, and none twice
    data = "benchmarks/experiments/.data/"
    written = {f"{data}vader/{name}" for name in prepare.SENTENCES}
    written |= {f"{data}{name}" for name in ("e2e", *prepare.models(Path()))}
    for folder in [config.model, *(str(task.data.data) for task in tasks)]:
        assert folder in written | {"examples/toolcalls"}
    assert config.output_dir == f"benchmarks/experiments/results/{path.stem}"
