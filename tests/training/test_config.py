"""One declaration of the settings: flags, YAML, defaults, and the messages for wrong ones."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import yaml

from lorakit.cli.parser import Parser
from lorakit.training.config import TrainConfig, warnings_for
from lorakit.training.settings import UsageError, add_setting_flags, commented_yaml, from_args, to_yaml

REQUIRED = ["--model", "m", "--data", "d", "--output-dir", "o"]


def parse(*words: str) -> TrainConfig:
    parser = Parser(prog="lorakit train")
    add_setting_flags(TrainConfig, parser)
    return from_args(TrainConfig, parser.parse_args(words))


def test_defaults_are_those_of_the_documentation() -> None:
    config = parse(*REQUIRED)
    assert (config.rank, config.alpha, config.dropout, config.targets) == (16, 32.0, 0.0, ("all-linear",))
    assert (config.learning_rate, config.scheduler, config.seed) == (2e-4, "linear", 0)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lora-r", "4"], "rank", 4),
        (["--lora_alpha", "32"], "alpha", 32.0),
        (["--lora-dropout=0.1"], "dropout", 0.1),
        (["--target-modules", "q_proj, v_proj"], "targets", ("q_proj", "v_proj")),
        (["--max_steps=7"], "max_steps", 7),
        (["--num-train-epochs", "1.5"], "epochs", 1.5),
        (["--lr", "1e-3"], "learning_rate", 1e-3),
        (["--dora"], "dora", True),
        (["--no-dora"], "dora", False),
        (["--init", "pissa"], "init", "pissa"),
        (["--model-name-or-path", "other"], "model", "other"),
        (["--dataset_name", "other"], "data", "d,other"),  # --data may be given several times
    ],
)
def test_flags_and_the_aliases_people_type(words: list[str], name: str, value: object) -> None:
    assert getattr(parse(*REQUIRED, *words), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rank", "abc"], "--rank: expected a whole number, found 'abc'"),
        (["--rank", "1.5"], "--rank: expected a whole number, found '1.5'"),
        (["--rank", "0"], "--rank: expected at least 1, found '0'"),
        (["--dropout", "1"], "--dropout: expected less than 1, found '1'"),
        (["--learning-rate", "-1"], "--learning-rate: expected more than 0, found '-1'"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number, found 'nan'"),
        (
            ["--init", "pisa"],
            "--init: expected one of kaiming, gaussian, pissa, olora, found 'pisa'. Did you mean 'pissa'",
        ),
        (["--learning-rte", "1"], "unknown argument '--learning-rte'. Did you mean '--learning-rate'"),
        (["--epoch", "1"], "unknown argument '--epoch'. Did you mean '--epochs'"),  # abbreviations are not accepted
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
    ],
)
def test_wrong_values_name_the_flag(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(*REQUIRED, *words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_that_is_missing_is_listed_with_an_example() -> None:
    with pytest.raises(UsageError, match=r"missing: --model path/to/model --output-dir out"):
        parse("--data", "d")


def test_yaml_and_flags_that_beat_it(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\noutput-dir: o\nlearning_rate: 2e-3\nrank: 4\ntargets: [q_proj, v_proj]\ndora: true\n"
    )
    config = parse("--config", str(file), "--rank", "8")
    assert (config.learning_rate, config.rank, config.targets, config.dora) == (2e-3, 8, ("q_proj", "v_proj"), True)


def test_problem_48_everything_wrong_with_a_file_is_listed_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\noutput_dir: o\nlearning_rte: 1\nrank: many\nepochs: 0\n"
        "lora:\n  r: 4\nseed: 1\nseed: 2\ndora: 'yes'\n"
    )
    with pytest.raises(UsageError) as error:
        parse("--config", str(file))
    assert str(error.value).splitlines() == [
        f"{file}:4: unknown key 'learning_rte'. Did you mean 'learning_rate'?",
        f"{file}:5: rank: expected a whole number, found 'many'.",
        f"{file}:6: epochs: expected more than 0, found 0.",
        f"{file}:7: unknown key 'lora'. The file is flat, without sections.",
        f"{file}:10: 'seed' stands here and in line 9.",
        f"{file}:11: dora: expected true or false, found 'yes'.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [("rank: [1\n", ":2: not YAML"), ("- rank\n", ":1: expected lines of the form `key: value`")],
)
def test_broken_yaml_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error:
        parse("--config", str(file))
    assert f"{file}{message}" in str(error.value)


def test_config_yaml_runs_it_again(tmp_path: Path) -> None:
    config = parse(*REQUIRED, "--rank", "3", "--targets", "q_proj,v_proj", "--lr", "1e-5", "--system", "ÄÖ: yes")
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse("--config", str(tmp_path / "config.yaml")) == config


def test_the_commented_file_is_valid_and_names_every_setting(tmp_path: Path) -> None:
    text = commented_yaml(TrainConfig, "train")
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert yaml.safe_load(text) == {"model": "path/to/model", "data": "data.jsonl", "output_dir": "out"}
    uncommented = "\n".join(
        line.removeprefix("# ") for line in text.splitlines() if line.partition(":")[0].strip("# ") in names
    )
    (tmp_path / "all.yaml").write_text(uncommented)
    assert parse("--config", str(tmp_path / "all.yaml")) == parse(
        "--model", "path/to/model", "--data", "data.jsonl", "--output-dir", "out"
    )
    assert set(yaml.safe_load(uncommented)) == names


def test_learning_rates_out_of_range_are_pointed_out() -> None:
    assert warnings_for(parse(*REQUIRED)) == []
    assert "full fine-tuning" in warnings_for(parse(*REQUIRED, "--lr", "1e-5"))[0]
    assert "divergence" in warnings_for(parse(*REQUIRED, "--lr", "0.1"))[0]


def test_no_argument_is_taken_for_another_parsers(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_setting_flags(TrainConfig, parser)
    parser.print_help()
    out = capsys.readouterr().out
    assert "(default: 16)" in out and "--model-name-or-path" in out
