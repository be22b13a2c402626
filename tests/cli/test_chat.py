"""The commands inside `lorakit chat`: what the model is then asked, and what is saved."""

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters import language_adapter
from lorakit.cli.main import main
from lorakit.training.data import read_data


@pytest.fixture(scope="module")
def folder(tiny_lm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_adapter(tiny_lm, tmp_path_factory.mktemp("chat") / "adapter")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts, as text; the answers are their numbers."""
    prompts: list[str] = []

    def stream(loaded: Any, ids: list[int], **_: Any) -> Iterator[str]:
        prompts.append(loaded.tokenizer.decode(ids))
        yield f"answer {len(prompts)}"

    monkeypatch.setattr("lorakit.training.generation.stream", stream)
    return prompts


def chat(folder: Path, typed: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(["chat", "--model", str(folder), "--dtype", "float32", *more]) == 0


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


OPENING = "<|im_start|>assistant\n"


def test_retry_asks_the_last_question_again_without_its_answer(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(folder, "/retry\non\noff\n/retry\n/retry\nand\n", monkeypatch)
    assert "(there is no question yet)" in capsys.readouterr().out
    start = turn("user", "on") + turn("assistant", "answer 1") + turn("user", "off")
    assert asked[1] == asked[2] == asked[3] == start + OPENING
    assert asked[4] == start + turn("assistant", "answer 4") + turn("user", "and") + OPENING


def test_the_system_message_can_be_set_and_seen(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(folder, "/system\n/system turn it off\non\n/system\n", monkeypatch)
    assert asked == [turn("system", "turn it off") + turn("user", "on") + OPENING]
    printed = capsys.readouterr().out
    assert "(there is no system message)" in printed and "(the system message: turn it off)" in printed
    chat(folder, "/system off\non\n", monkeypatch, "--plain")
    assert "(without a chat template there is no system message)" in capsys.readouterr().out and asked[1] == "on"


def test_a_message_between_quotes_has_several_lines(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat(folder, '"""turn\n\n  the light\noff"""\n/clear\n"""\non\n"""\n/clear\n"""on"""\n', monkeypatch)
    assert asked == [turn("user", text) + OPENING for text in ("turn\n\n  the light\noff", "on", "on")]


def test_what_is_saved_is_a_row_to_train_on(
    folder: Path, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    chat(folder, "/save a.jsonl\non\n/save\n/save a.txt\n/save none/a.jsonl\n/save a.jsonl\n", monkeypatch)
    chat(folder, "/system turn\noff\nand\n/save a.jsonl\n", monkeypatch)
    printed = capsys.readouterr().out
    for said in (
        *("(there is nothing to save yet)", "(name a file that ends in .jsonl", "(none/a.jsonl: No such file"),
        *("(added to a.jsonl: 2 messages)", "(added to a.jsonl: 4 messages)"),
    ):
        assert said in printed
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    first, second = (json.loads(line)["messages"] for line in (tmp_path / "a.jsonl").read_text().splitlines())
    assert first == [{"role": "user", "content": "on"}, {"role": "assistant", "content": "answer 1"}]
    assert second[0] == {"role": "system", "content": "turn"} and [one["role"] for one in second[1:]] == [
        "user", "assistant", "user", "assistant"
    ]  # fmt: skip
    assert len(read_data(str(tmp_path / "a.jsonl"), fields={}, holdout=0.0).train) == 2


def test_help_lists_the_commands_and_an_unknown_one_does_so_too(
    folder: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(folder, "/help\n/nonsense\n", monkeypatch)
    printed = capsys.readouterr().out
    assert asked == [] and printed.count("/save FILE    adds the conversation to a .jsonl file") == 2
    assert max(map(len, printed.splitlines())) <= 80
