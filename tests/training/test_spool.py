"""Rows that lie in a file instead of memory: the same rows, the same run, and memory that does not grow with them."""

import dataclasses
import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from conftest import tiny_tokenizer
from lorakit.training import spool
from lorakit.training.config import TrainConfig
from lorakit.training.data import read_data
from lorakit.training.loop import train
from lorakit.training.prepare import prepare
from lorakit.training.record import run_record
from lorakit.training.rows import DataError, Findings, read_file
from lorakit.training.spool import Picked, Spool, as_dataset, picked, viewed
from lorakit.training.tokens import encode_all


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_FEW", 3)
    monkeypatch.setattr(spool, "_BUFFER", 64)


def write(path: Path, count: int, kinds: int = 10**9) -> str:
    rows = ({"prompt": f"turn {i % kinds} on", "completion": f"light {i}"} for i in range(count))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 300, 1000])
def test_a_spool_is_the_list_that_was_appended(count: int, few: None) -> None:
    order = random.Random(0)
    rows = [{"row": i, "text": "é" * order.randrange(50)} for i in range(count)]
    found = Spool(rows)
    assert isinstance(found.settled(), list) == (count <= 3)
    assert len(found) == count and list(found) == rows and found[:] == rows and list(found) == rows
    assert found[1:-1:2] == rows[1:-1:2]
    for index in (-1, 0, count // 2):
        if count:
            assert found[index] == rows[index]
    with pytest.raises(IndexError, match="out of range"):
        found[count]
    found.append({"row": -1})
    assert found[len(found) - 1] == {"row": -1} and found[:-1] == rows


def test_views_of_rows(few: None) -> None:
    rows = Spool(range(10))
    chosen = picked(rows, [7, 1, 1, 9])
    assert isinstance(chosen, Picked) and list(chosen) == [7, 1, 1, 9] and chosen[-1] == 9 and chosen[1:3] == [1, 1]
    assert picked(list(range(10)), [7, 1]) == [7, 1]
    doubled = viewed(chosen, lambda row: 2 * row)
    assert list(doubled) == [14, 2, 2, 18] and doubled[0] == 14 and doubled[2:] == [2, 18] and len(doubled) == 4
    dicts = [{"input_ids": [i] * (i % 5 + 1), "labels": [-100] * (i % 5 + 1)} for i in range(9)]
    for own in (dicts, Spool(dicts)):
        with as_dataset(own) as dataset:
            assert [dict(row) for row in dataset] == dicts


def test_many_rows_give_what_few_rows_give(tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a.jsonl", 60, kinds=25), write(tmp_path / "b.jsonl", 30)
    config = TrainConfig(str(tiny_lm), f"{a},{b}=0.5", str(tmp_path / "out"), holdout=0.2, seed=3, dry_run=True)
    monkeypatch.setattr("lorakit.training.plan.step_storages", lambda *_: 1 / 0)
    for packing in (False, True):
        own = dataclasses.replace(config, packing=packing)
        monkeypatch.setattr(spool, "_FEW", 10_000)
        memory = prepare(own)
        monkeypatch.setattr(spool, "_FEW", 3)
        stored = prepare(own)
        assert isinstance(memory.train, list) and isinstance(stored.train, list) == packing  # 3 packs are few
        assert list(stored.data.train) == memory.data.train and stored.data.valid == memory.data.valid
        assert list(stored.train) == memory.train and list(stored.valid) == memory.valid
        assert stored.notes == memory.notes and run_record(stored) == run_record(memory)


@pytest.mark.usefixtures("few_objects")
def test_a_run_on_stored_rows_is_the_run_on_rows_in_memory(tiny_lm: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lorakit.training.plan.step_storages", lambda *_: 1 / 0)
    data = write(tmp_path / "a.jsonl", 40, kinds=7)
    usual: dict[str, Any] = dict(rank=2, targets=("q_proj",), dtype="float32", eval_samples=0, max_steps=4)
    files = []
    for name, limit in (("memory", 10_000), ("stored", 3)):
        monkeypatch.setattr(spool, "_FEW", limit)
        train(TrainConfig(str(tiny_lm), data, str(tmp_path / name), **usual))
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("labels", ["ab", [1.5, 2.0], [1, 2, 3]])
def test_many_rows_with_labels(labels: Any, tiny_encoder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("lorakit.training.plan.step_storages", lambda *_: 1 / 0)
    rows = [{"text": f"turn {i % 31}", "label": labels[i % len(labels)]} for i in range(60)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TrainConfig(str(tiny_encoder), str(tmp_path / "d.jsonl"), str(tmp_path / "out"), holdout=0.2)
    memory = prepare(config)
    monkeypatch.setattr(spool, "_FEW", 3)
    stored = prepare(config)
    assert isinstance(memory.train, list) and not isinstance(stored.train, list)
    assert list(stored.train) == memory.train and list(stored.valid) == memory.valid
    assert list(stored.data.train) == memory.data.train and stored.data.labels == memory.data.labels
    assert stored.notes == memory.notes and run_record(stored) == run_record(memory)


def peak_of(path: str) -> int:
    """The most memory that checking a file takes, as Python counts it."""
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {"max_length": 64, "too_long": "drop", "system": None, "chat": True}
    tracemalloc.start()
    try:
        encode_all(read_data(path).train, tokenizer, **options)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_rows(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_FEW", 300)
    monkeypatch.setattr(spool, "_BUFFER", 4096)
    peaks = []
    for count in (600, 600, 3000):  # the first run fills caches
        text = Path(write(tmp_path / "d.jsonl", count)).read_text()
        if suffix == ".csv":
            text = "prompt,completion\n" + "".join(f"turn {i} on,light {i}\n" for i in range(count))
        path = tmp_path / f"d{count}{suffix}"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith(".gz") else text.encode())
        peaks.append(peak_of(str(path)))
    # 2,400 more rows as lists and examples take several megabytes; their places in files take 100 bytes each at most.
    assert peaks[2] - peaks[1] < 2400 * 100


# --- lines of JSON in a stream ---------------------------------------------------------------------------------------


def rows_of_text(tmp_path: Path, text: str) -> tuple[list[tuple[str, dict]], list[str]]:
    (tmp_path / "d.jsonl").write_text(text)
    findings = Findings()
    return [(row.where, row.values) for row in read_file(tmp_path / "d.jsonl", findings)], findings.problems


def test_a_file_is_read_while_its_rows_are_taken(tmp_path: Path) -> None:
    path = Path(write(tmp_path / "d.jsonl", 50_000))
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n')  # not UTF-8
    rows = read_file(path, Findings())
    assert next(rows).where == "d.jsonl:1"
    with pytest.raises(DataError, match=r"d\.jsonl:50001: not UTF-8"):
        list(rows)


@pytest.mark.parametrize(
    ("text", "places", "problems"),
    [
        ('{"a": 1}\n{"a": 2}\n\n{"a": 3}', [1, 2, 4], []),
        ('{"a": 1}\n{"a": 2}\n{"a": \n3}\n{"a": 4}\n', [1, 2, 3, 5], []),  # a value over two lines
        ('{"a": 1}\n{"a": 2}\n{"a" 3}\n{"a": 4}\n', [1, 2, 4], [3]),
        ('{"a": 1}\n{"a": 2}\n{"a": 3', [1, 2], [3]),
        ('{"a": 1}\n{"a": 2}\n{"a": 3}{"a": 4}\n', [1, 2, 3, 3], []),
        ('{"a": 1}\n{"a": 2}\n[3]\n"x"\n{"a": 4}\n', [1, 2, 5], [3, 4]),
        ('{"a": 1}\r\n{"a": 2}\r\n{"a": 3}\r\n', [1, 2, 3], []),
        ('{"a": 1}\n{"a": 2}\n{"a": 1, "a": 2}\n{"a": 4}\n', [1, 2, 4], [3]),
        ('{"a": 1}\n{"a": 2}\n{"a": "\\ud800"}\n{"a": 4}\n', [1, 2, 4], [3]),
        ('{"a": 1}\n{"a": 2}\n{"a" 3}\n{"b" 4}\n{"a": 5}\n', [1, 2, 5], [3, 4]),
    ],
)
def test_lines_of_every_kind(text: str, places: list[int], problems: list[int], tmp_path: Path) -> None:
    found, said = rows_of_text(tmp_path, text)
    assert [where for where, _ in found] == [f"d.jsonl:{line}" for line in places]
    assert [int(problem.split(":")[1]) for problem in said] == problems
