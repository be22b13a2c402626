"""Writing and reading runs.jsonl, and a row as the mean of its runs."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from lorakit.study.comparison.results import Interval, Ledger, Run, row_of


def run(key: str = "k", **changes: Any) -> Run:
    usual = Run(
        key=key,
        task="reviews",
        method="lora rank=8",
        seed=0,
        learning_rate=1e-3,
        steps=10,
        parameters=2048,
        head=66,
        diverged=False,
        valid={"loss": 0.5, "accuracy": 80.0},
        test={"accuracy": 75.0},
        seconds=1.5,
        peak_bytes=1000,
        file_bytes=8456,
        latency=(0.002, 0.003),
        base_latency=(0.001, 0.001),
    )
    return dataclasses.replace(usual, **changes)


LINE = (
    '{"key": "k", "task": "reviews", "method": "lora rank=8", "seed": 0, "learning_rate": 0.001, "steps": 10, '
    '"parameters": 2048, "head": 66, "diverged": false, "valid": {"loss": 0.5, "accuracy": 80.0}, '
    '"test": {"accuracy": 75.0}, "seconds": 1.5, "peak_bytes": 1000, "file_bytes": 8456, "latency": [0.002, 0.003], '
    '"base_latency": [0.001, 0.001], "other_seconds": 0.0, "alone": false, "together": 1}\n'
)


def test_a_run_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    ledger = Ledger(path)
    assert not path.exists() and len(ledger) == 0
    ledger.add(run())
    assert path.read_bytes() == LINE.encode()
    ledger.add(run("other", seed=1))
    assert Ledger(path).get("k") == run() and Ledger(path).get("other") == run("other", seed=1)
    assert ledger.get("none") is None


def test_the_later_of_two_lines_with_one_key_counts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.add(run(test={}))
    ledger.add(run())
    assert len(ledger) == 1 and ledger.get("k") == run()
    assert Ledger(ledger.path).get("k") == run()
    assert len(ledger.path.read_text().splitlines()) == 2


@pytest.mark.parametrize("kept", [1, 20, len(LINE) - 2, len(LINE) - 1])
def test_a_line_that_was_cut_off_costs_that_run_alone(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(LINE.replace('"k"', '"first"') + LINE[:kept])
    ledger = Ledger(path)
    assert ledger.get("first") == run("first")
    assert (ledger.get("k") is None) == (kept < len(LINE) - 1)  # only the end of the line is missing in the last
    ledger.add(run("next"))
    again = Ledger(path)
    assert again.get("first") == run("first") and again.get("next") == run("next")
    assert again.get("k") == ledger.get("k")


def test_a_line_with_the_shortest_turn_alone_is_read_and_has_no_interval(tmp_path: Path) -> None:
    """As lorakit wrote it before it kept every turn."""
    path, line = tmp_path / "runs.jsonl", json.loads(LINE)
    path.write_text(json.dumps({**line, "latency": 0.006, "base_latency": 0.004}) + "\n")
    (found,) = Ledger(path)
    assert found == run(latency=(0.006,), base_latency=(0.004,))
    row = row_of([found, run(latency=tuple(range(1, 10)), base_latency=(1.0,) * 9)], [], "loss")
    assert row.latency_ends is None


def test_lines_of_another_version_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    more, fewer = json.loads(LINE), json.loads(LINE)
    more["colour"] = "red"
    del fewer["seconds"]
    timeless = {**json.loads(LINE), "latency": None}
    del timeless["base_latency"]
    lines: list[Any] = [more, fewer, timeless, [], 7, None]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "\n" + LINE)
    assert len(Ledger(path)) == 1


def test_numbers_that_json_has_no_word_for_survive(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "runs.jsonl")
    ledger.add(run(valid={"perplexity": math.inf}))
    again = Ledger(ledger.path).get("k")
    assert again is not None and again.valid == {"perplexity": math.inf}


def test_an_interval_is_student_s() -> None:
    values = (70.0, 72.0, 71.0, 75.0)
    interval = Interval.of(values)
    assert interval.mean == 72.0 and interval.values == values
    # the 97.5 % quantile of t with 3 degrees of freedom, from a printed table
    assert interval.half == pytest.approx(3.182446 * statistics.stdev(values) / 2, rel=1e-6)
    assert Interval.of([70.0]) == Interval(70.0, None, (70.0,))
    assert Interval.of([70.0, 70.0, 70.0]).half == 0
    # Two seeds tell next to nothing: t's quantile is 12.7 then.
    assert Interval.of([0.0, 100.0]) == Interval(50.0, None, (0.0, 100.0)) and Interval.of([0.0, 100.0]).ends is None
    with pytest.raises(ValueError, match=r"^an interval of no values\.$"):
        Interval.of([])


def test_an_interval_ends_where_the_score_does() -> None:
    half = 4.302653 * statistics.stdev([90.0, 99.0, 100.0]) / math.sqrt(3)  # the quantile with 2 degrees of freedom
    mean = 289 / 3
    free, shares = (Interval.of([90.0, 99.0, 100.0], bounds) for bounds in ((None, None), (0.0, 100.0)))
    assert free.ends == pytest.approx((mean - half, mean + half), rel=1e-6) and not free.is_cut
    assert shares.ends == pytest.approx((mean - half, 100.0), rel=1e-6) and shares.is_cut
    assert not Interval.of([50.0, 51.0, 52.0], (0.0, 100.0)).is_cut
    row = row_of([run(seed=i, test={"accuracy": v, "own": v}) for i, v in enumerate((90.0, 99.0, 100.0))], [], "loss")
    assert row.scores["accuracy"].ends == shares.ends and row.scores["own"].ends == free.ends


def test_a_row_sums_up_its_runs() -> None:
    runs = [
        run(
            test={"accuracy": 70.0, "f1": 60.0}, seconds=1.0, peak_bytes=5, latency=(3.0, 4.0), base_latency=(2.0,) * 2
        ),
        run(seed=1, diverged=True, test={}, valid={}, seconds=0.5, peak_bytes=9),  # ratios of 2 and 3
        run(
            seed=2, test={"accuracy": 74.0, "f1": 66.0}, seconds=6.0, peak_bytes=7, latency=(9.0,), base_latency=(2.0,)
        ),
    ]
    searched = [runs[0], run(learning_rate=3e-3, diverged=True, valid={})]
    row = row_of(runs, searched, "loss")
    assert (row.task, row.method, row.parameters, row.head) == ("reviews", "lora rank=8", 2048, 66)
    assert (row.seeds, row.diverged, row.learning_rate) == (3, 1, 1e-3)
    assert row.tried == {1e-3: 0.5, 3e-3: None}
    assert [*row.scores] == ["accuracy", "f1"]
    assert row.scores["accuracy"].values == (70.0, 74.0) and row.scores["f1"].mean == 63.0
    assert (row.seconds, row.peak_bytes, row.file_bytes) == (1.0, 9, 8456)
    assert (row.latency, row.latency_ends) == (2.0, None)  # of 1.5, 2, 2, 3, 4.5


def test_a_row_of_diverged_runs_has_no_scores() -> None:
    runs = [run(seed=seed, diverged=True, test={}, valid={}) for seed in range(2)]
    row = row_of(runs, [], "loss")
    assert (row.scores, row.tried, row.diverged) == ({}, {}, 2)
