"""results.json and the command that makes a run again."""

import argparse
import dataclasses
import json
import shlex

import pytest

from lorakit.cli.parser import Parser
from lorakit.training.config import TrainConfig
from lorakit.training.outcome import Outcome, last_losses, scores_of, trained_seconds
from lorakit.training.report import Evaluation
from lorakit.training.settings import add_setting_flags, from_args, settings_table, to_command


def parsed(command: str) -> TrainConfig:
    parser = Parser()
    add_setting_flags(TrainConfig, parser)
    program, verb, *words = shlex.split(command)
    assert (program, verb) == ("lorakit", "train")
    return from_args(TrainConfig, argparse.Namespace(**vars(parser.parse_args(words))))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 8, "alpha": 16.0, "learning_rate": 1e-3, "epochs": 2.0, "targets": ("q_proj", "*.3.*"), "seed": 7},
        {"system": 'Don\'t be "long".\n-- Thanks', "prompt_field": "-q", "rslora": True, "report_to": ("a", "b")},
        {"learning_rate": 0.000123456789, "max_steps": 10, "exclude": ("lm_head",), "dropout": 0.1},
    ],
)
def test_the_command_gives_the_settings_again(settings: dict[str, object]) -> None:
    config = TrainConfig("a model", "it's.jsonl", "out", **settings)  # type: ignore[arg-type]
    assert parsed(to_command(config, "train")) == config


def test_only_settings_that_differ_from_their_defaults_are_in_the_command_and_marked() -> None:
    config = TrainConfig("m", "d", "o", rank=8, epochs=2.0)
    assert to_command(config, "train") == "lorakit train --model m --data d --output-dir o --rank 8 --epochs 2"
    table = settings_table(config)
    assert {table.rows[row][0] for row, _ in table.marked} == {"model", "data", "output_dir", "rank", "epochs"}
    assert ("targets", "all-linear") in table.rows and ("system", "none") in table.rows
    assert len(table.rows) == len(dataclasses.fields(config))


def test_the_file_holds_scores_with_intervals_and_no_number_that_json_has_not() -> None:
    metrics = {"exact match": (0.0, 0.8125), "perplexity": (float("inf"), 3.0)}
    result = Evaluation(96, "test", metrics, (), (), (), {"exact match": ((0.0, 0.038), (0.723, 0.878))})
    outcome = Outcome("0.3.0", "now", "m", "d", "lorakit", "CPU", 1.0, 2, None, 3, 4, {}, 96, "test", scores_of(result))
    found = json.loads(outcome.as_json())
    assert found["scores"]["exact match"] == {
        "base": 0.0, "adapter": 0.8125, "base_interval": [0.0, 0.038], "adapter_interval": [0.723, 0.878],
    }  # fmt: skip
    assert found["scores"]["perplexity"] == {
        "base": None, "adapter": 3.0, "base_interval": None, "adapter_interval": None,
    }  # fmt: skip
    assert found["planned_bytes"] is None and found.keys() == {field.name for field in dataclasses.fields(Outcome)}
    assert scores_of(None) == {}


def test_the_last_losses_are_those_of_the_newest_lines() -> None:
    history: list[dict[str, float]] = [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": 2.5}, {"loss": 1.0}, {}]
    assert last_losses(history) == {"training": 1.0, "held-out": 2.5}
    assert last_losses([]) == {}


@pytest.mark.parametrize(
    ("logged", "newest", "seconds"),
    [([], 5.0, 5.0), ([1.0, 4.0], 5.0, 5.0), ([10.0, 20.0, 3.0, 6.0], 7.0, 27.0), ([10.0, 20.0], 2.0, 22.0),
     ([10.0, 20.0], 0.0, 20.0)],
)  # fmt: skip
def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(logged: list[float], newest: float, seconds: float) -> None:
    history = [{"step": float(step), "seconds": one} for step, one in enumerate(logged)]
    assert trained_seconds(history, newest) == seconds
