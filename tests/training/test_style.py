"""A model gets its prompts in the style of its training."""

import shutil
from pathlib import Path

import pytest

from conftest import tiny_tokenizer
from lorakit.training.data import Example
from lorakit.training.style import Style, longest_text

PAIR = Example("d:1", prompt="a", completion="b")
TEXT = Example("d:1", text="a b")
TALK = Example("d:1", messages=({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}))


@pytest.mark.parametrize(
    ("rows", "plain", "chat"),
    [
        ([PAIR], False, True),
        ([PAIR], True, False),
        ([TEXT], False, False),  # plain text is never put in a template
        ([TEXT], True, False),
        ([TALK], False, True),
        ([TALK], True, True),  # and a conversation always is
    ],
)
def test_the_style_of_a_run_is_how_its_rows_were_written(rows: list[Example], plain: bool, chat: bool) -> None:
    tokenizer = tiny_tokenizer()
    assert Style.of_rows(rows, tokenizer, plain=plain, system="Hm.") == Style(chat, "Hm.")
    without = tiny_tokenizer(chat_template=None)
    assert not Style.of_rows(rows, without, plain=plain, system=None).chat


@pytest.mark.parametrize("style", [Style(True), Style(False), Style(True, "Be “brief”."), Style(False, "")])
def test_a_style_is_remembered_for_the_folder_and_its_checkpoints(style: Style, tmp_path: Path) -> None:
    style.write(tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "other").mkdir()
    tokenizer = tiny_tokenizer()
    assert Style.recorded(tmp_path, tokenizer) == style
    assert Style.recorded(tmp_path / "checkpoint-4", tokenizer) == style
    assert Style.recorded(tmp_path / "other", tokenizer) == Style(True)


def test_flags_beat_what_is_remembered(tmp_path: Path) -> None:
    Style(False, "Be brief.").write(tmp_path)
    tokenizer = tiny_tokenizer()
    assert Style.recorded(tmp_path, tokenizer, system="Be long.", plain=False) == Style(True, "Be long.")
    assert Style.recorded(tmp_path, tiny_tokenizer(chat_template=None), plain=False) == Style(False, "Be brief.")


@pytest.mark.parametrize(
    ("text", "style", "length"),
    [
        ("plain: true\nsystem: Be brief.\nmax_seq_length: 48\n", Style(False, "Be brief."), 48),
        ("plain: false\n", Style(True), 1024),
        ("", Style(True), 1024),
    ],
)
def test_folders_of_runs_that_recorded_settings_alone(text: str, style: Style, length: int, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert Style.recorded(tmp_path, tiny_tokenizer()) == style
    assert longest_text(tmp_path) == length


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("style.json", "[]", r"style\.json: expected an object"),
        ("style.json", "{", r"style\.json:1: not JSON"),
        ("style.json", '{"chat": "yes"}', r"style\.json: expected chat to be true or false"),
        ("config.yaml", "plain: [", r"config\.yaml:\d: not YAML"),
        ("config.yaml", "- a\n", r"config\.yaml:1: expected lines"),
        ("config.yaml", "plain: maybe\n", r"config\.yaml:1: plain: expected true or false"),
    ],
)
def test_a_broken_file_is_named(file: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        Style.recorded(tmp_path, tiny_tokenizer())


def test_an_adapter_without_a_word_about_it_is_asked_in_the_tokenizers_template(tiny_lm: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_lm, tmp_path / "model")
    assert Style.recorded(tmp_path / "model", tiny_tokenizer()) == Style(True)
