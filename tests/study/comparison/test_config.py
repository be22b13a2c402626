"""The settings of a comparison: flags, a file, the three levels, and the messages for mistakes."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from lorakit.study.comparison.config import CompareConfig, config_of, tasks_of
from lorakit.study.methods.baselines import BitFit, Full, Houlsby, LoRA, PrefixLayer
from lorakit.training.settings import UsageError, add_setting_flags, to_yaml

FILE = """\
model: base
output_dir: out
data: all.jsonl
epochs: 3
batch-size: 8
learning_rate: 2e-4
tasks:
  reviews: {epochs: 5, train_rows: 100}
  news:
    data: news.jsonl
    metrics: [f1, accuracy]
    published: {paper: 90.5, other: {f1: 80}}
    methods:
      - lora rank=2
      - {method: full, epochs: 7}
methods:
  - full
  - lora rank=4
  - method: lora rank=64
    learning_rate: 1e-4
    batch-size: 2
"""


def read(*flags: str) -> CompareConfig:
    parser = argparse.ArgumentParser()
    add_setting_flags(CompareConfig, parser)
    return config_of(parser.parse_args(flags))


def written(folder: Path, text: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(folder: Path, text: str, *flags: str) -> list[str]:
    """The message for a file whose first two lines are correct."""
    path = written(folder, "model: m\noutput_dir: o\n" + text)
    with pytest.raises(UsageError, match=r"\S") as caught:
        tasks_of(read("-c", path, *flags))
    return [line.replace(f"{path}:", "line ") for line in str(caught.value).splitlines()]


def test_flags_alone_make_one_task_named_after_its_data() -> None:
    config = read(
        *("--model", "m", "-o", "out", "--data", "folder/sentences.jsonl", "--seeds", "2", "--batch-size", "4"),
        *("--methods", "full, lora rank=4,adapter-h norms=false"),
    )
    (task,) = tasks_of(config)
    assert (task.name, task.data.data, task.data.seeds) == ("sentences", "folder/sentences.jsonl", 2)
    assert [m.method for m in task.methods] == [Full(), LoRA(rank=4), Houlsby(norms=False)]
    assert {m.training.batch_size for m in task.methods} == {4}
    assert {m.training.learning_rate for m in task.methods} == {None}


def test_without_methods_the_paper_s_are_compared() -> None:
    (task,) = tasks_of(read("--model", "m", "-o", "out", "--data", "d"))
    assert [m.method for m in task.methods] == [Full(), BitFit(), Houlsby(), PrefixLayer(), LoRA()]


def test_the_innermost_level_wins(tmp_path: Path) -> None:
    reviews, news = tasks_of(read("--config", written(tmp_path, FILE)))
    assert (reviews.name, reviews.data.data, reviews.data.train_rows) == ("reviews", "all.jsonl", 100)
    assert (news.name, news.data.data, news.data.train_rows) == ("news", "news.jsonl", None)
    assert (reviews.data.metrics, news.data.metrics) == ((), ("f1", "accuracy"))
    assert (reviews.data.published, news.data.published) == ({}, {"paper": 90.5, "other": {"f1": 80}})

    def settings(task):
        return [(m.method, m.training.epochs, m.training.batch_size, m.training.learning_rate) for m in task.methods]

    # task over top; method over task; the task's own methods in place of the top's
    assert settings(reviews) == [
        (Full(), 5, 8, 2e-4),
        (LoRA(rank=4), 5, 8, 2e-4),
        (LoRA(rank=64), 5, 2, 1e-4),
    ]
    assert settings(news) == [(LoRA(rank=2), 3, 8, 2e-4), (Full(), 7, 8, 2e-4)]


def test_flags_beat_the_whole_file(tmp_path: Path) -> None:
    """A flag wins at the top of the file, in a task and in a method's settings; other settings stay."""
    path = written(tmp_path, FILE)
    reviews, news = tasks_of(read("-c", path, "--epochs", "1", "--lr", "0.5"))
    assert [(m.method, m.training.epochs, m.training.learning_rate) for m in (*reviews.methods, *news.methods)] == [
        *((method, 1, 0.5) for method in (Full(), LoRA(rank=4), LoRA(rank=64), LoRA(rank=2), Full()))
    ]
    assert [m.training.batch_size for m in reviews.methods] == [8, 8, 2]
    reviews, news = tasks_of(read("-c", path, "--methods", "bitfit", "--train-rows", "7"))
    assert [(m.method, m.training.epochs) for m in reviews.methods] == [(BitFit(), 5)]
    assert [(m.method, m.training.epochs) for m in news.methods] == [(BitFit(), 3)]
    assert (reviews.data.train_rows, news.data.train_rows) == (7, 7)


def test_methods_in_a_file_may_stand_in_one_line_as_in_a_flag(tmp_path: Path) -> None:
    head = "model: m\noutput_dir: o\ndata: d\n"
    for line in ("methods: full, lora rank=4", "methods: [full, lora rank=4]"):
        (task,) = tasks_of(read("-c", written(tmp_path, head + line)))
        assert [m.method for m in task.methods] == [Full(), LoRA(rank=4)]


def test_what_the_output_folder_holds_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    config = read("-c", written(tmp_path, FILE), "--template", "{prompt}\n", "--label-smoothing", "1e-5")
    again = read("-c", written(tmp_path, to_yaml(config)))
    assert again == config
    assert tasks_of(again) == tasks_of(config)
    flags = read("--model", "m", "-o", "out", "--data", "d", "--methods", "full,lora rank=4", "--metrics", "f1")
    assert read("-c", written(tmp_path, to_yaml(flags))) == flags


def test_every_setting_that_a_method_takes_changes_its_runs() -> None:
    """Every setting that a method's mapping takes is part of the key of its runs."""
    from lorakit.study.comparison.plan import DECIDES

    training = [own.name for own in dataclasses.fields(CompareConfig) if own.metadata["group"] == "training"]
    assert {*training} == {*DECIDES, "learning_rate"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: d\nepohcs: 3\n", ["line 4: unknown key 'epohcs'. Did you mean 'epochs'?"]),
        ("data: d\ntaks: {a: {data: d}}\n", ["line 4: unknown key 'taks'. Did you mean 'tasks'?"]),
        (
            "data: d\ntraining: {epochs: 3}\n",
            ["line 4: unknown key 'training'. The file is flat, without sections."],
        ),
        (
            "tasks:\n  a:\n    data: d\n    trian_rows: 3\n",
            ["line 6: unknown key 'trian_rows'. Did you mean 'train_rows'?"],
        ),
        ("tasks:\n  a: {data: d, seeds: 3}\n", ["line 4: 'seeds' cannot be set here, but at the top of the file."]),
        (
            "tasks:\n  a:\n    data: d\n    model: other\n    tasks: {}\n",
            [
                "line 6: 'model' cannot be set here, but at the top of the file.",
                "line 7: 'tasks' cannot be set here, but at the top of the file.",
            ],
        ),
        ("tasks:\n  a: {data: d, epochs: 0}\n", ["line 4: epochs: expected more than 0, found 0."]),
        ("tasks:\n  a: {data: d}\n  b: {}\n", ["task b: data is missing."]),
        ("tasks:\n  a: d.jsonl\n", ["line 4: expected lines of the form `key: value`."]),
        ("tasks: [d.jsonl]\n", ["line 3: tasks: expected names of tasks, each with its settings."]),
        (
            "tasks:\n  a: {data: d}\n  b: {data: e}\n  a: {data: f}\n",
            ["line 6: the task 'a' stands here and in line 4."],
        ),
        ("", ["missing: --data data.jsonl   (or tasks: in a YAML file)"]),
        (
            "data: d\nmethods:\n  - full\n  - lroa rank=4\n",
            ["line 6: unknown method 'lroa'. Did you mean 'lora'? Methods: "],
        ),
        (
            "data: d\nmethods:\n  - {method: lora rnk=4, epochs: 0}\n",
            [
                "line 5: epochs: expected more than 0, found 0.",
                "line 5: 'lora rnk=4': 'rnk=4' is no setting; Did you mean 'rank'? lora takes rank=…",
            ],
        ),
        (
            "data: d\nmethods:\n  - method: lora\n    data: e\n    epoch: 3\n",
            [
                "line 6: 'data' cannot be set here, but at the top of the file.",
                "line 7: unknown key 'epoch'. Did you mean 'epochs'?",
            ],
        ),
        ("data: d\nmethods:\n  - {epochs: 3}\n", ["line 5: expected one key `method` that names it."]),
        ("data: d\nmethods:\n  - {method: full, method: lora}\n", ["line 5: expected one key `method` that names it."]),
        ("data: d\nmethods: []\n", ["line 4: methods: names no method."]),
        ("data: d\nmethods:\n", ["line 4: methods: names no method."]),
        ("data: d\nmethods: 7\n", ["line 4: methods: unknown method '7'. Methods: "]),
        ("data: d\nmethods: [full, lora, lora rank=8]\n", ["methods: 'lora rank=8' is named twice."]),
        (
            "tasks:\n  a: {data: d, methods: [full, 'lora init=x']}\n",
            ["line 4: 'lora init=x': init: expected one of kaiming, "],
        ),
        ("data: d\npublished: [1]\n", ["line 4: published: expected labels, each with a number or with numbers by"]),
        ("data: d\npublished: {paper: high}\n", ["line 4: published: expected labels, each with a number or with"]),
        ("data: d\npublished: {paper: true}\n", ["line 4: published: expected labels, each with a number or with"]),
        ("data: d\ntemplate: 'Question:'\n", ["task d: template: 'Question:' has no {prompt} in it."]),
        ("tasks:\n  a: {data: d, template: '{promt}'}\n", ["task a: template: '{promt}' has no {prompt} in it."]),
        (
            "data: d\nseeds: 0\ntrials: many\n",
            ["line 4: seeds: expected at least 1, found 0.", "line 5: trials: expected"],
        ),
    ],
)
def test_mistakes_in_a_file_are_listed_with_their_lines(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = problems(tmp_path, text)
    assert len(found) == len(expected), found
    for line, beginning in zip(found, expected, strict=True):
        assert line.startswith(beginning), line


def test_mistakes_in_flags_name_the_flag() -> None:
    base = ("--model", "m", "-o", "out", "--data", "d")
    for flags, message in [
        (("--methods", "full,lroa"), r"^--methods: unknown method 'lroa'\. Did you mean 'lora'\?"),
        (("--methods", " , "), r"^--methods: names no method\.$"),
        (("--methods", "lora rank=x"), r"^--methods: 'lora rank=x': rank: expected a whole number, found 'x'\.$"),
        (("--seeds", "0"), r"^--seeds: expected at least 1, found '0'\.$"),
        (("--scheduler", "linaer"), r"^--scheduler: expected one of linear, .* Did you mean 'linear'\?$"),
    ]:
        with pytest.raises(UsageError, match=message):
            read(*base, *flags)
    with pytest.raises(UsageError, match=r"^methods: 'full' is named twice\.$"):
        tasks_of(read(*base, "--methods", "full,full"))
    with pytest.raises(UsageError, match=r"^missing: --model path/to/model --output-dir out "):
        read("--data", "d")
