"""Every number that a command takes has its limits, wherever it comes from: a flag, a file, Python."""

import argparse
import dataclasses
import math
import typing
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.adapters import named_path_type
from lorakit.cli.main import VERBS, _parser, main
from lorakit.core.paths import expanded
from lorakit.study.comparison.config import CompareConfig
from lorakit.training.config import TrainConfig
from lorakit.training.settings import UsageError

NEEDED = {"--model": "m", "--data": "d", "--output-dir": "o", "--prompt": "p"}
CONFIGS: dict[str, type[Any]] = {"train": TrainConfig, "check": TrainConfig, "compare": CompareConfig}
# None of these is a valid value of any flag.
BAD = ["nan", "inf", "-inf", "-1e9", "1e400", "abc", "", " ", "1,5", "0x10", "3 4"]


def numeric(verb: str) -> list[str]:
    """The flags of a command that take a number."""
    return [
        action.option_strings[0]
        for action in _parser(verb)._actions
        if action.option_strings
        and (action.metavar in ("N", "X") or action.type not in (None, expanded, named_path_type))
    ]


FLAGS = [(verb, flag) for verb in VERBS for flag in numeric(verb)]


def settings(config: type[Any], *kinds: type) -> list[str]:
    types = typing.get_type_hints(config)
    return [
        field.name
        for field in dataclasses.fields(config)
        if any(kind is types[field.name] or kind in typing.get_args(types[field.name]) for kind in kinds)
    ]


def test_flags_with_numbers_are_known_by_their_types() -> None:
    found = set(FLAGS)
    assert {("eval", "--max-samples"), ("generate", "--temperature"), ("merge", "--tolerance")} <= found
    for verb, config in CONFIGS.items():
        assert {flag for own, flag in FLAGS if own == verb} == {
            f"--{name.replace('_', '-')}" for name in settings(config, int, float)
        }
    for verb in VERBS:  # a plain `type=int` would take any number
        assert not [action for action in _parser(verb)._actions if action.type in (int, float)]


@pytest.mark.parametrize(("verb", "flag"), FLAGS, ids=lambda word: word)
def test_no_flag_takes_what_is_no_number_of_its_range(verb: str, flag: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    parser = _parser(verb)
    needed = [word for own, value in NEEDED.items() if parser.has(own) for word in (own, value)]
    for value in BAD:
        assert main([verb, *needed, f"{flag}={value}"]) == 2, (flag, value)
        err = capsys.readouterr().err
        assert err.startswith(f"lorakit {verb}: {flag}: expected ") and f"found {value!r}" in err
        assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval", "--max-samples", "-1"], "--max-samples: expected at least 1, found '-1'"),
        (["eval", "--max-samples", "0"], "--max-samples: expected at least 1, found '0'"),
        (["eval", "--show", "-1"], "--show: expected at least 0, found '-1'"),
        (["eval", "--max-new-tokens", "0"], "--max-new-tokens: expected at least 1, found '0'"),
        (["generate", "--temperature", "-0.5"], "--temperature: expected at least 0, found '-0.5'"),
        (["chat", "--top-p", "2"], "--top-p: expected at most 1, found '2'"),
        (["chat", "--top-p", "0"], "--top-p: expected more than 0, found '0'"),
        (["merge", "--tolerance", "-1e-3"], "--tolerance: expected more than 0, found '-1e-3'"),
        (["train", "--lr", "-1e-3"], "--learning-rate: expected more than 0, found '-1e-3'"),
        (["train", "--lr", "-inf"], "--learning-rate: expected a finite number, found '-inf'"),
        (["train", "--seed", "-1"], "--seed: expected at least 0, found '-1'"),
        (["train", "--seed", "4294967296"], "--seed: expected at most 4294967295, found '4294967296'"),
        (["train", "--rank", "10000000000"], "--rank: expected at most 2147483647, found '10000000000'"),
        (["train", "--rank", "1e30"], "--rank: expected at most 2147483647, found '1e30'"),
        (["compare", "--seeds", "1000000"], "--seeds: expected at most 1000, found '1000000'"),
    ],
)
def test_the_limit_that_does_not_hold_is_named(words: list[str], expected: str, capsys) -> None:
    assert main(words) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("config", [TrainConfig, CompareConfig])
def test_the_limits_hold_for_python_too(config: type[Any]) -> None:
    needed = {"model": "m", "data": "d", "output_dir": "o"}
    for name in settings(config, int, float):
        for value in (math.nan, math.inf, -math.inf, -1e9, 1e400, "abc", [1], {}, True, object()):
            with pytest.raises(UsageError, match=f"^{name}: expected .*, found "):
                config(**needed, **{name: value})
    for name in settings(config, bool):
        with pytest.raises(UsageError, match=f"^{name}: expected true or false, found 'yes'"):
            config(**needed, **{name: "yes"})
    with pytest.raises(UsageError, match="^scheduler: expected one of linear, cosine, constant, found 'lineer'"):
        config(**needed, scheduler="lineer")
    with pytest.raises(UsageError, match="(?s)^model: expected text, found None.*epochs: expected more than 0"):
        config(**{**needed, "model": None}, epochs=0)
    assert dataclasses.replace(config(**needed), batch_size=4).batch_size == 4
    with pytest.raises(UsageError, match="^batch_size: expected at least 1, found 0"):
        dataclasses.replace(config(**needed), batch_size=0)


def test_python_may_give_what_a_flag_would() -> None:
    config = TrainConfig(model=Path("m"), data="d", output_dir="o", targets=["q_proj"], alpha=8, rank=4.0)  # type: ignore[arg-type]
    assert (config.model, config.targets, config.alpha, config.rank) == ("m", ("q_proj",), 8.0, 4)
    assert type(config.alpha) is float and type(config.rank) is int
    assert TrainConfig(model="m", data="d", output_dir="o", targets="q_proj,v_proj").targets == ("q_proj", "v_proj")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model", ""], "--model: expected a name, found ''"),
        (["--output-dir", "  "], "--output-dir: expected a name, found '  '"),
        (["--targets", ","], "--targets: expected a name, found ','"),
    ],
)
def test_nothing_is_no_name(words: list[str], expected: str, capsys) -> None:
    rest = [word for own in ("--model", "--data", "--output-dir") if own not in words for word in (own, "x")]
    assert main(["train", *rest, *words]) == 2
    assert expected in capsys.readouterr().err


def test_a_parser_of_its_own_has_the_same_flags() -> None:
    from lorakit.training.settings import add_setting_flags

    parser = argparse.ArgumentParser()
    add_setting_flags(TrainConfig, parser)
    assert {a.dest for a in parser._actions} >= {field.name for field in dataclasses.fields(TrainConfig)}
