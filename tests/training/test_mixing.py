"""Several data sets in one run: which rows are read, how often, and the ways to write them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.core.errors import LoraError
from lorakit.training.config import TrainConfig
from lorakit.training.data import read_data
from lorakit.training.mixing import Source, sources
from lorakit.training.rows import DataError
from lorakit.training.settings import from_args


def write(path: Path, count: int, word: str, chat: bool = False) -> str:
    pairs = [(f"{word} {number}", f"{number}") for number in range(count)]
    rows = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        if chat
        else {"prompt": a, "completion": b}
        for a, b in pairs
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(data: str, **options) -> Counter:
    return Counter(row.prompt for row in read_data(data, holdout=0, **options).train)


def test_each_data_set_is_read_as_often_as_its_weight_says(tmp_path: Path) -> None:
    a, b, c = (write(tmp_path / f"{name}.jsonl", 10, name) for name in "abc")
    found = asked(f"{a},{b}=0.3,{c}=2.5", seed=1)
    assert {prompt: found[prompt] for prompt in found if prompt[0] == "a"} == {f"a {i}": 1 for i in range(10)}
    assert sum(1 for prompt in found if prompt[0] == "b") == 3
    assert set(map(found.get, (p for p in found if p[0] == "b"))) == {1}
    assert sorted(found[f"c {i}"] for i in range(10)) == [2] * 5 + [3] * 5
    assert asked(f"{a},{b}=0.3,{c}=2.5", seed=1) == found
    assert asked(f"{a},{b}=0.3,{c}=2.5", seed=2) != found
    assert asked(f"{a}=0.01") == Counter({next(iter(asked(f"{a}=0.01"))): 1})  # at least one row
    notes = read_data(f"{a},{b}=0.3", holdout=0).notes
    assert f"rows of each data set in an epoch: {a} 10, {b} 3 (=0.3 of 10)" in notes


def test_rows_are_held_out_before_they_are_repeated(tmp_path: Path) -> None:
    a, b = (write(tmp_path / f"{name}.jsonl", 40, name) for name in "ab")
    data = read_data(f"{a},{b}=3", holdout=0.2, seed=3)
    held, trained = {row.prompt for row in data.valid}, {row.prompt for row in data.train}
    assert len(data.valid) == len(held) == 16 and not held & trained and len(held | trained) == 80
    assert {word[0] for word in held if word} == {"a", "b"}
    counts = Counter(row.prompt for row in data.train)
    assert all(count == (3 if prompt and prompt[0] == "b" else 1) for prompt, count in counts.items())


def test_splits_of_several_folders_are_put_together(tmp_path: Path) -> None:
    for folder in "ab":
        write(tmp_path / folder / "train.jsonl", 4, folder)
        write(tmp_path / folder / "test.jsonl", 2, f"{folder} test")
    data = read_data(f"{tmp_path / 'a'},{tmp_path / 'b'}=0.5")
    assert (len(data.train), len(data.valid), len(data.test)) == (6, 0, 4)


def test_conversations_and_pairs_may_be_mixed_and_texts_not(tmp_path: Path) -> None:
    talk, pairs = write(tmp_path / "t.jsonl", 3, "t", chat=True), write(tmp_path / "p.jsonl", 3, "p")
    data = read_data(f"{talk},{pairs}", holdout=0)
    assert data.shape == "messages | prompt+completion" and len(data.train) == 6 and data.task == "causal-lm"
    (tmp_path / "x.txt").write_text("a text\n")
    with pytest.raises(DataError, match=r"x.txt: rows of the shape text, but \S+t.jsonl has messages"):
        read_data(f"{talk},{tmp_path / 'x.txt'}", holdout=0)


def test_bad_rows_name_their_data_set(tmp_path: Path) -> None:
    for folder in "ab":
        write(tmp_path / folder / "train.jsonl", 2, folder)
    (tmp_path / "b" / "train.jsonl").write_text('{"prompt": "x", "completion": null}\n')
    with pytest.raises(DataError, match=rf"{tmp_path / 'b'} · train.jsonl:1: completion is null"):
        read_data(f"{tmp_path / 'a'},{tmp_path / 'b'}", holdout=0)


def test_a_path_wins_over_what_it_could_mean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.jsonl", "c=2", "d.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert sources("a,b.jsonl") == [Source("a,b.jsonl")]
    assert sources("d.jsonl,a,b.jsonl=2,c=2") == [Source("d.jsonl"), Source("a,b.jsonl", 2.0), Source("c=2")]
    assert sources("user/set=0.5, d.jsonl") == [Source("user/set", 0.5), Source("d.jsonl")]
    assert sources("user/set") == [Source("user/set")] and sources("x=y") == [Source("x=y")]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sources("d.jsonl,~/d.jsonl=2") == [Source("d.jsonl"), Source("~/d.jsonl", 2.0)]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "1e9", ""])
def test_weights_that_are_refused(weight: str, tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", 2, "a")
    with pytest.raises(LoraError, match="a weight is a number above 0, at most 1000, found"):
        sources(f"{a}={weight}")


@pytest.mark.parametrize(
    "lines",
    ["data: [a.jsonl, b.jsonl=0.3]", "data:\n- a.jsonl\n- b.jsonl: 0.3", "data: a.jsonl,b.jsonl=0.3"],
)
def test_files_and_flags_say_the_same(lines: str, tmp_path: Path) -> None:
    import argparse

    from lorakit.training.settings import add_setting_flags

    def parsed(*words: str) -> TrainConfig:
        parser = argparse.ArgumentParser()
        add_setting_flags(TrainConfig, parser)
        return from_args(TrainConfig, parser.parse_args([*words, "--model", "m", "--output-dir", "o"]))

    file = tmp_path / "lora.yaml"
    file.write_text(lines)
    assert parsed("--config", str(file)).data == "a.jsonl,b.jsonl=0.3"
    assert parsed("--data", "a.jsonl", "--data", "b.jsonl=0.3").data == "a.jsonl,b.jsonl=0.3"
    file.write_text("data: {a.jsonl: 1, b.jsonl: 0.3}")
    assert parsed("--config", str(file)).data == "a.jsonl=1,b.jsonl=0.3"


def test_a_mixture_is_checked_on_the_command_line(tiny_lm: Path, tmp_path: Path, capsys) -> None:
    a, b = write(tmp_path / "a.jsonl", 6, "a", chat=True), write(tmp_path / "b.jsonl", 10, "b")
    assert main(["check", "--model", str(tiny_lm), "--data", a, "--data", f"{b}=0.3", "--holdout", "0"]) == 0
    printed = capsys.readouterr().out
    assert f"{a},{b}=0.3: messages | prompt+completion; rows: train 9" in printed
    assert f"rows of each data set in an epoch: {a} 6, {b} 3 (=0.3 of 10)" in printed
