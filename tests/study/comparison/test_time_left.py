"""How many runs are left and how long they take, from runs made by hand and from a clock that the test moves."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.study.comparison import progress
from lorakit.study.comparison.config import CompareConfig, MethodConfig
from lorakit.study.comparison.plan import TaskPlan, plan_block, run_key
from lorakit.study.comparison.progress import RunsProgress
from lorakit.study.comparison.results import Ledger, Run
from lorakit.study.comparison.search import next_rate
from lorakit.study.comparison.tasks import StudyTask
from lorakit.study.comparison.time_left import TimeLeft
from lorakit.study.methods.naming import method_of, name_of
from lorakit.training import pace
from runs_elsewhere import Leaving

CONFIG = CompareConfig(model="m", output_dir="o", batch_size=8, epochs=4.0)  # 24 rows: 12 steps
BITFIT = MethodConfig(method_of("bitfit"), CONFIG)
LORA = MethodConfig(method_of("lora rank=2 targets=0"), dataclasses.replace(CONFIG, epochs=1.0))  # 3 steps
GIVEN = MethodConfig(method_of("full"), dataclasses.replace(CONFIG, learning_rate=1e-3))


class Other(Leaving):
    """Another task."""

    name, fingerprint = "other", "other"


def made(task: StudyTask, method: MethodConfig, seed: int, rate: float, score: float = 1.0, **changes: Any) -> Run:
    """A run of 20 seconds of training and 5 of all else."""
    usual = Run(
        key=run_key(task, method, seed, rate), task=task.name, method=name_of(method.method), seed=seed,
        learning_rate=rate, steps=10, parameters=1, head=1, diverged=False, valid={"error": score}, test={},
        seconds=20.0, peak_bytes=1, file_bytes=1, latency=(1.0,), base_latency=(1.0,), other_seconds=5.0,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "runs.jsonl")


def test_the_runs_of_a_search_are_counted_down_to_those_that_it_needs(ledger: Ledger) -> None:
    task = Leaving()
    left = TimeLeft([TaskPlan(task, [BITFIT])], 3, 4, ledger)
    assert left.most == left.runs() == 4 + 2  # four rates with seed 0, the best of them with two other seeds
    tried: dict[float, float | None] = {}
    for count, score in enumerate((0.5, 0.6, 0.7), 1):  # a higher and a lower rate are both worse
        rate = next_rate(BITFIT.method, tried, 4)
        assert rate is not None
        tried[rate] = score
        ledger.add(made(task, BITFIT, 0, rate, score))
        left.finished(made(task, BITFIT, 0, rate, score))
        assert left.runs() == (6 - count if count < 3 else 2)  # the fourth rate is not needed
    assert next_rate(BITFIT.method, tried, 4) is None and tried[1e-3] == 0.5
    # Another process has not the weights of the best run, and makes it again.
    assert TimeLeft([TaskPlan(task, [BITFIT])], 3, 4, ledger).runs() == 3
    for seed in (0, 1, 2):
        ledger.add(made(task, BITFIT, seed, 1e-3, 0.5, test={"error": 1.0}))
        assert left.runs() == (2, 1, 0)[seed]
    assert left.told() == "" and left.most == 6


def test_the_time_of_a_method_is_that_of_its_runs_and_of_a_new_one_the_mean_of_the_others(ledger: Ledger) -> None:
    task = Leaving()
    plan = TaskPlan(task, [GIVEN, BITFIT, LORA])
    left = TimeLeft([plan], 2, 1, ledger)
    assert (left.runs(), left.seconds(), left.told()) == (6, (0.0, 6), "at most 6 more runs")
    # A run of other settings, of another task, and one that ended before its first step say nothing.
    other = dataclasses.replace(GIVEN, training=dataclasses.replace(GIVEN.training, batch_size=4))
    ledger.add(made(task, other, 0, 1e-3, seconds=1e6))
    ledger.add(made(Other(), GIVEN, 0, 1e-3, seconds=1e6))
    ledger.add(made(task, BITFIT, 1, 1e-3, steps=0, diverged=True, seconds=1e6))
    assert left.seconds()[1] == left.runs()
    ledger.add(made(task, GIVEN, 0, 1e-3, test={"error": 1.0}))  # 2 s a step and 5 s
    # One run of full: 12 · 2 + 5. Of the others: two of BitFit with 12 steps, two of LoRA with 3, at the same pace.
    assert left.seconds() == (29 + 2 * 29 + 2 * 11, 0)
    ledger.add(made(task, LORA, 0, 1e-3, steps=3, seconds=12.0, other_seconds=7.0))  # 4 s a step and 7 s
    ledger.add(made(task, LORA, 1, 1e-3, steps=3, seconds=24.0, other_seconds=9.0, test={"error": 1.0}))  # 8 s and 9 s
    # LoRA: one run with 3 steps of 6 s and 8 s. BitFit: (2 + 6) / 2 s a step and (5 + 8) / 2 s.
    assert left.seconds() == (29 + 2 * (12 * 4 + 6.5) + (3 * 6 + 8), 0)
    assert left.told() == "at most 4 more runs, about 164 s"


def test_a_task_without_a_run_is_counted_and_not_estimated(ledger: Ledger) -> None:
    plans = [TaskPlan(Leaving(), [GIVEN]), TaskPlan(Other(), [GIVEN, BITFIT])]
    left = TimeLeft(plans, 2, 1, ledger)
    ledger.add(made(plans[0].task, GIVEN, 0, 1e-3, test={"error": 1.0}))
    assert left.told() == "at most 5 more runs; 1 of them: about 29 s, the others not timed yet"
    assert [left.knows(task, "full") for task in ("leaving", "other")] == [True, False]


def test_the_plan_says_how_long_it_takes_as_far_as_runs_are_known(ledger: Ledger) -> None:
    plans = [TaskPlan(Leaving(), [GIVEN])]
    config = dataclasses.replace(CONFIG, seeds=2, learning_rate=1e-3)

    def last_lines() -> list[str]:
        return plan_block(config, plans, TimeLeft(plans, 2, 1, ledger)).splitlines()[-2:]

    most = "at most 2: 2 seeds, learning rates given"
    assert last_lines() == [most, "how long they take is told after the first steps"]
    ledger.add(made(plans[0].task, GIVEN, 0, 1e-3, test={"error": 1.0}, seconds=2000.0))  # 12 · 200 + 5 s
    assert last_lines() == [most, "at most 1 more run, about 40 min"]
    ledger.add(made(plans[0].task, GIVEN, 1, 1e-3, test={"error": 1.0}))
    assert last_lines() == [most, "all are finished"]


def test_the_first_steps_tell_before_a_run_is_finished(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [50.0]
    for module in (progress, pace):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    plan = TaskPlan(Leaving(), [GIVEN, BITFIT])
    shown = RunsProgress()
    shown.begin(TimeLeft([plan], 2, 1, ledger))

    def steps(method: str, before: float, each: float) -> list[str]:
        """The lines that come during the 12 steps of a run. before: seconds until the first one begins."""
        shown.run("leaving", method, 0, 1e-3, 12)
        clock[0] += before
        for _ in range(12):
            clock[0] += each
            shown.step()
        return capsys.readouterr().err.splitlines()

    # Four runs of 12 · 10 s and of what came before the second step, 40 + 10 s: 680 s.
    assert steps("full", 40.0, 10.0) == ["leaving: full: at most 4 more runs, about 11 min, this one included"]
    run = made(plan.task, GIVEN, 0, 1e-3, test={"error": 1.0}, seconds=100.0, other_seconds=80.0)  # 10 s a step
    ledger.add(run)
    shown.finished(run)
    line = "leaving: full, rate 0.001, seed 0: test: error 1.00; 100 s; at most 3 more runs, about 10 min"  # 3 · 200 s
    assert capsys.readouterr().err.splitlines() == [line]
    assert steps("full", 40.0, 10.0) == []  # known
    run = made(plan.task, GIVEN, 1, 1e-3, test={"error": 1.0}, seconds=100.0, other_seconds=80.0)
    ledger.add(run)
    shown.finished(run)
    assert capsys.readouterr().err.endswith("; at most 2 more runs, about 7 min\n")  # BitFit taken for as fast as full
    assert steps("bitfit", 4.0, 1.0) == ["leaving: bitfit: at most 2 more runs, about 34 s, this one included"]
    for seed in (0, 1):
        run = made(plan.task, BITFIT, seed, 1e-3, test={"error": 1.0})
        ledger.add(run)
        shown.finished(run)
    assert capsys.readouterr().err.splitlines()[-1].endswith("error 1.00; 20 s")
