"""What is printed at the end of a run."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.numbers import size
from lorakit.core.table import Table
from lorakit.training import page, report


def test_the_next_commands_can_be_copied_where_lorakit_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/demo runs .venv/bin/lorakit, which the calling shell does not find by its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv/bin/lorakit"), "train"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "\n  .venv/bin/lorakit chat --model runs/a\n" in report.next_commands(Path("runs/a"), answers=True)
    program = tmp_path / "lorakit"
    program.touch(mode=0o755)
    assert "\n  lorakit chat --model runs/a\n" in report.next_commands(Path("runs/a"), answers=True)
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    assert "\n  lorakit generate --model 'my runs' --prompt 'it'\"'\"'s'\n" in report.next_commands(
        Path("my runs"), answers=True, prompt="it's"
    )


@pytest.mark.parametrize("word", ["plain", "it's", "two words", "-p", "--help", "$HOME `ls`", 'a "b"\nc', "é😀", "*"])
def test_the_next_commands_are_what_a_shell_reads(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = report.next_commands(Path(word.replace("\n", "")), answers=False, prompt=word, pair=word)
    lines = printed.partition("\n")[2].partition("\n")[2].replace("\n  lorakit", "\0").strip("\0 ").split("\0")
    generate, merge = (shlex.split(line.removeprefix("lorakit")) for line in lines)
    flags = [part for flag in ("--model", "--prompt", "--pair") for part in _given(generate, flag)]
    assert flags == [word.replace("\n", ""), word, word]
    assert _given(merge, "--output-dir") == [word.replace("\n", "") + "-merged"]


def _given(words: list[str], flag: str) -> list[str]:
    """The value of a flag, which follows it or comes after an equals sign."""
    return [
        word.partition("=")[2] if word.startswith(f"{flag}=") else words[index + 1]
        for index, word in enumerate(words)
        if word == flag or word.startswith(f"{flag}=")
    ]


@pytest.mark.parametrize(("folder", "merged"), [("a/b", "a/b-merged-2"), ("a/b/..", "a-merged"), (".", "here-merged")])
def test_the_merged_folder_is_one_in_which_nothing_is_yet(
    folder: str, merged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    (here / "a" / "b").mkdir(parents=True)
    (here / "a" / "b-merged").mkdir()
    monkeypatch.chdir(here)
    printed = report.next_commands(Path(folder), answers=True)
    found = Path(shlex.split(printed)[-1])
    assert found.resolve() == (here.parent if folder == "." else here) / merged


def test_the_page_shows_what_went_wrong_before_what_went_right() -> None:
    samples = tuple(report.Sample(f"asked-{i}", "base", "adapter", "expected") for i in range(12))
    right = tuple(i not in (3, 5, 6, 8, 11) for i in range(12))
    result = report.Evaluation(12, "test", {"exact match": (0.0, 7 / 12)}, samples, right)
    answers = page.answers_of(result)
    assert [int(answer.asked.removeprefix("asked-")) for answer in answers] == [3, 5, 6, 8, 11, 0, 1, 2, 4, 7, 9, 10]
    assert [answer.right for answer in answers] == [False] * 5 + [True] * 7
    # What is right is not marked, whatever its text.
    assert [answer.adapter for answer in answers] == [[("adapter", True)]] * 5 + [[("adapter", False)]] * 7


def test_numbers_are_shown_by_how_far_they_are_off() -> None:
    samples = tuple(report.Sample(f"{i}", "0.000", f"{number:.3f}", "1.000") for i, number in enumerate((1.5, 4, -3)))
    result = report.Evaluation(3, "test", {"pearson": (0.0, 0.5)}, samples)
    answers = page.answers_of(result)
    assert [answer.asked for answer in answers] == ["2", "1", "0"] and {answer.right for answer in answers} == {None}


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_answers_are_broken_between_words_at_the_width_of_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    answer = '{"name": "set_light", "arguments": {"room": "the second bathroom", "on": false, "brightness": 80}}'
    result = report.Evaluation(1, "test", {}, (report.Sample("asked", "", answer, answer.replace("80", "90")),))
    lines = report.comparison(result).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("    adapter   "))
    assert lines[start - 2 : start] == ["  asked", "    base"]
    assert max(map(len, lines[start:])) <= columns and (len(lines) == start + 2) == (columns == 200)
    adapter, expected = " ".join(line.strip() for line in lines[start:]).split("expected  ")
    assert adapter.split() == ["adapter", *answer.split()] and expected == answer.replace("80", "90")
    assert all(line.startswith(" " * 14) for line in lines[start:] if not re.match("    (adapter|expected)  ", line))


def test_the_page_of_numbers_has_a_search_and_no_filter_and_that_of_plain_text_has_neither() -> None:
    without: dict[str, Any] = dict(title="", facts={}, command="", settings=Table((), ()), summary="", history=[])
    samples = tuple(report.Sample("a", "0.000", f"{number}.000", "1.000") for number in range(3))
    numbers = report.Evaluation(3, "test", {"pearson": (0.1, 0.5)}, samples)
    shown = page.render(**without, changes=[], result=numbers)
    assert shown.count("<article") == 3 and 'type="search"' in shown and 'name="which"' not in shown.split("<script")[0]
    texts = report.Evaluation(3, "test", {"perplexity": (10.0, 5.0)}, (), intervals={"perplexity": ((9, 11), (4, 6))})
    shown = page.render(**without, changes=[], result=texts)
    assert "95 % interval 4.000 to 6.000; base 9.000 to 11.000" in shown
    assert "<script" not in shown and 'type="search"' not in shown and 'class="scale"' not in shown


def test_a_score_is_printed_with_its_interval() -> None:
    result = report.Evaluation(
        96, "test", {"exact match": (0.0, 0.8125), "pearson": (0.1, 0.25)}, (), (), (),
        {"exact match": ((0.0, 0.0385), (0.7228, 0.8782))},
    )  # fmt: skip
    printed = report.comparison(result).splitlines()
    assert "exact match           0.0% → 81.2%   95 % interval 72.3% to 87.8%" in printed
    assert "pearson              0.100 → 0.250" in printed
    alone = report.comparison(result, adapted=False).splitlines()
    assert "exact match           0.0%   95 % interval 0.0% to 3.9%" in alone
    assert report.metrics_table(result).rows[0] == ("exact match", "0.0% (0.0% to 3.9%)", "81.2% (72.3% to 87.8%)")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 kB"), (147_456, "147 kB"), (1_000_000, "1.0 MB"), (9_437_184, "9.4 MB"), (1_420_000_000, "1.42 GB")],
)
def test_sizes_are_shown_in_the_unit_that_fits(count: int, shown: str) -> None:
    assert size(count) == shown
