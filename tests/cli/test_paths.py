"""Paths on the command line and in files of settings: ~ is the home folder wherever a path is allowed."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import VERBS, _parser
from lorakit.study.comparison.config import CompareConfig, tasks_of
from lorakit.training.config import TrainConfig
from lorakit.training.settings import from_args


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def names_a_path(help: str | None) -> bool:
    """What a flag's help says of a value that is a path: a folder, a file or a checkpoint to be named."""
    words = (
        "folder",
        " file;",
        "file,",
        "YAML file",
        "to a file",
        "checkpoint to continue",
        "where to write",
        ".gguf",
        "a second adapter,",
    )
    return any(word in f"{help}" for word in words)


def flags() -> list[tuple[str, argparse.Action]]:
    return [
        (verb, action)
        for verb in VERBS
        for action in _parser(verb)._actions
        if action.nargs in (None, "?") and names_a_path(action.help) and not isinstance(action.const, bool)
        if "|" not in f"{action.metavar}"  # a choice of words is no path
    ]


def test_the_flags_that_take_a_path_are_found_by_their_help() -> None:
    found = {action.dest for _, action in flags()}
    assert found == {
        "adapter",
        "model",
        "data",
        "config",
        "json",
        "output_dir",
        "resume",
        "file",
        "other",
        "from_adapter",
    }


@pytest.mark.parametrize(("verb", "action"), flags(), ids=lambda own: own if isinstance(own, str) else own.dest)
def test_a_flag_expands_the_home_folder(verb: str, action: argparse.Action, home: str) -> None:
    parser = _parser(verb)
    config: type[Any] | None = {"train": TrainConfig, "check": TrainConfig, "compare": CompareConfig}.get(verb)
    if config and action.dest in (own.name for own in dataclasses.fields(config)):
        needed = {"model", "data", "output_dir"} - {action.dest}
        required = [word for name in sorted(needed) for word in (f"--{name}", "x")]
        args = parser.parse_args([*required, action.option_strings[0], "~/a"])
        assert getattr(from_args(config, args), action.dest) == f"{home}/a"
        return
    others = [own for own in parser._actions if own.required and own.dest != action.dest]
    given = [word for own in others for word in _given(own, next(iter(own.choices or ["x"])))]
    parsed = parser.parse_args([*given, *_given(action, "~/a")])
    found = getattr(parsed, action.dest)
    assert found == f"{home}/a" or found == [("a", f"{home}/a")]  # the second, where it may have a name


def _given(action: argparse.Action, value: str) -> list[str]:
    return [*action.option_strings[:1], value]


@pytest.mark.parametrize("name", ["./a", "a/", "a", "owner/a", "a~b", "./~"])
def test_other_paths_stay_as_they_are_written(name: str) -> None:
    assert TrainConfig(model=name, data=name, output_dir="x").model == name


def test_a_file_of_settings_expands_it_too(home: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("model: ~/m\ndata: ~/d.jsonl\noutput_dir: ~/o\nresume: ~/o/checkpoint-1\n")
    config = from_args(TrainConfig, _parser("train").parse_args(["--config", "~/own.yaml"]))
    assert (config.model, config.data, config.output_dir) == (f"{home}/m", f"{home}/d.jsonl", f"{home}/o")
    assert config.resume == f"{home}/o/checkpoint-1"


def test_a_comparisons_tasks_expand_it_too(home: str) -> None:
    config = CompareConfig(model="~/m", output_dir="~/o", tasks={"own": {"data": "~/d.jsonl"}})
    assert [task.data.data for task in tasks_of(config)] == [f"{home}/d.jsonl"]
