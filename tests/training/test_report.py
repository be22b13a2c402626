"""What is printed at the end of a run."""

import re
import sys
from pathlib import Path

import pytest

from lorakit.training import page, report


def test_the_next_commands_can_be_copied_where_lorakit_is_not_on_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scripts/demo runs .venv/bin/lorakit, which the shell it was called from does not find by its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / ".venv/bin/lorakit"), "train"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "\n  .venv/bin/lorakit chat --model runs/a\n" in report.next_commands(Path("runs/a"), "hello")
    program = tmp_path / "lorakit"
    program.touch(mode=0o755)
    assert "\n  lorakit chat --model runs/a\n" in report.next_commands(Path("runs/a"), "hello")
    monkeypatch.setattr(sys, "argv", ["my_program.py"])
    assert "\n  lorakit generate --model 'my runs' --prompt 'it'\"'\"'s'\n" in report.next_commands(
        Path("my runs"), "it's"
    )


def test_the_page_shows_what_went_wrong_before_what_went_right() -> None:
    samples = tuple(report.Sample(f"asked-{i}", "base", "adapter", "expected") for i in range(12))
    right = tuple(i not in (3, 5, 6, 8, 11) for i in range(12))
    result = report.Comparison(12, "test", {"exact match": (0.0, 7 / 12)}, samples, right)
    html = page.render(title="t", summary="", history=[], result=result, changes=[])
    order = re.findall(r"asked-(\d+)", html)
    assert order == ["3", "5", "6", "8", "0", "1", "2", "4", "7", "9", "10", "11"]
    assert html.index("asked-4") < html.index("<details>") < html.index("asked-7")


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 kB"), (147_456, "147 kB"), (1_000_000, "1.0 MB"), (9_437_184, "9.4 MB"), (1_420_000_000, "1.42 GB")],
)
def test_sizes_are_shown_in_the_unit_that_fits(count: int, shown: str) -> None:
    assert report.size(count) == shown
