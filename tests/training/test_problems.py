"""What is wrong with many rows is said once for each cause."""

import json
from pathlib import Path

import pytest

from lorakit.training.data import read
from lorakit.training.problems import grouped
from lorakit.training.rows import DataError


def test_a_cause_of_many_rows_is_one_line() -> None:
    problems = [f"a.jsonl:{n}: prompt is null" for n in (2, 3, 4, 5, 9, 11, 12)]
    assert grouped(problems) == ["a.jsonl:2: prompt is null (6 more such rows: 3-5, 9, 11-12)"]
    mixed = [*problems, "a.jsonl:13: label is null", "a.jsonl:14: label is null", "b.jsonl:1: prompt is null"]
    assert grouped(mixed)[1:] == mixed[7:]  # few rows keep their lines, another file is another list
    assert grouped([f"a.json[{n}]: x: y" for n in range(6)]) == ["a.json[0]: x: y (5 more such rows: 1-5)"]
    assert grouped([f"a.parquet row {n}: x" for n in range(1, 7)]) == ["a.parquet row 1: x (5 more such rows: 2-6)"]
    far = [f"a.jsonl:{2 * n}: x" for n in range(1, 100)]
    (line,) = grouped(far)
    assert line.startswith("a.jsonl:2: x (98 more such rows: 4, 6, 8, ") and line.endswith(", 62, …)")
    without = ["the file is empty", "the file is empty", "C:\\a\\b.csv:3: 2 cells"]
    assert grouped(without) == ["the file is empty", "C:\\a\\b.csv:3: 2 cells"]


def test_the_rows_of_a_file_that_share_a_cause(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": None, "completion": "b"}] * 400 + [{"q": 1}] * 2
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="^402 bad rows; nothing was loaded") as error:
        read(str(path))
    lines = str(error.value).splitlines()
    assert len(lines) == 4
    assert lines[1].startswith("d.jsonl:1: prompt is null") and lines[1].endswith(" (399 more such rows: 2-400)")
    assert [line.partition(": ")[0] for line in lines[2:]] == ["d.jsonl:401", "d.jsonl:402"]
