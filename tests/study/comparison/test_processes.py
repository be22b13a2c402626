"""Runs in processes of their own: their memory, their results, and how they end."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

import runs_elsewhere
from lorakit.cli import failures
from lorakit.core.errors import RaisedElsewhere, module_that_raised
from lorakit.study.comparison import table
from lorakit.study.comparison.config import CompareConfig, MethodConfig
from lorakit.study.comparison.plan import TaskPlan
from lorakit.study.comparison.processes import OwnProcess, _sendable
from lorakit.study.comparison.results import Comparison
from lorakit.study.comparison.run import compare
from lorakit.study.comparison.runner import Order, Runner, ThisProcess
from lorakit.study.methods.naming import method_of

pytestmark = pytest.mark.usefixtures("few_objects")
CONFIG = CompareConfig(model="", output_dir="", epochs=2.0, batch_size=8)
TIMES = ("seconds", "other_seconds", "peak_bytes", "latency", "base_latency", "alone")


class Told:
    """Records what a run says. stop: raise KeyboardInterrupt at the first word, as Ctrl-C does in this process."""

    def __init__(self, stop: bool = False) -> None:
        self.heard: list[str] = []
        self.stop = stop

    def step(self) -> None:
        self.heard.append("step")

    def says(self, what: str) -> None:
        self.heard.append(what)
        if self.stop:
            raise KeyboardInterrupt


def order(folder: Path) -> Order:
    return Order("key", MethodConfig(method_of("lora rank=2 targets=0"), CONFIG), 0, 1e-3, folder / "weights")


def compared(folder: Path, runner: Runner) -> tuple[Comparison, list[dict[str, Any]]]:
    """Full fine-tuning with a given rate, then LoRA, whose rate is searched; each with one seed."""
    full = MethodConfig(method_of("full"), dataclasses.replace(CONFIG, learning_rate=1e-2))
    lora = MethodConfig(method_of("lora rank=2 targets=0"), CONFIG)
    plan = TaskPlan(runs_elsewhere.Leaving(), [full, lora])
    found = compare("numbers", [plan], folder, seeds=1, trials=1, runner=runner)
    return found, [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def test_the_peak_of_a_run_after_a_large_one_is_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """And nothing but times and memory tells in which process a run was made."""
    left = tmp_path / "own" / ".lorakit" / "runs" / "weights"  # by a comparison that was killed
    left.parent.mkdir(parents=True)
    left.write_text("half of a file")
    capfd.readouterr()
    own, lines = compared(tmp_path / "own", OwnProcess())
    told = capfd.readouterr().err.splitlines()
    assert [line.split(", rate")[0] for line in told] == ["leaving: full", "leaving: lora rank=2 targets=0"], told
    here, lines_here = compared(tmp_path / "here", ThisProcess())
    runs_elsewhere.KEPT.clear()
    large, small = own.rows
    assert large.peak_bytes > small.peak_bytes + 250e6
    large, small = here.rows
    assert abs(large.peak_bytes - small.peak_bytes) < 100e6
    assert all(row.alone for row in own.rows) and not any(row.alone for row in here.rows)
    assert "Peak memory is that of a process which makes a single run." in table.tables_text(own)
    assert "Peak memory is that of a process which made several runs, and may" in " ".join(
        table.tables_text(here).split()
    )

    def timeless(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in run.items() if name not in TIMES} for run in runs]

    # Full fine-tuning's run, LoRA's in the search, and the same one with its test scores from the kept weights.
    assert timeless(lines) == timeless(lines_here) and [bool(run["test"]) for run in lines] == [True, False, True]
    assert lines[1]["valid"] == lines[2]["test"]  # the same rows in this task
    assert all(run["other_seconds"] > 0 for run in lines)
    assert {path.name for path in (tmp_path / "own").iterdir()} == {"runs.jsonl", "machine.json"}


def test_an_error_arrives_with_its_message_and_where_it_was_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = Told()
    with pytest.raises(ValueError, match=r"^invalid literal for int\(\) with base 10: 'no number'$") as caught:
        OwnProcess().do(runs_elsewhere.refuse, runs_elsewhere.Leaving(), order(tmp_path), told)
    assert told.heard == ["step", "refusing"]
    assert module_that_raised(caught.value) == "runs_elsewhere"
    assert 'int("no number")' in "".join(traceback.format_exception(caught.value))
    # The command line marks it as an error of another library, as it would in one process.
    assert failures.report(caught.value, "compare", debug=False) == 1
    assert capsys.readouterr().err.endswith("(--debug shows where)\n")


def test_an_error_that_pickle_cannot_copy_keeps_its_type_and_message_as_text() -> None:
    error, cause = _sendable(runs_elsewhere.Odd("this went", "wrong"))
    assert (type(error), str(error)) == (RuntimeError, "Odd: this went")
    copied = pickle.loads(pickle.dumps((error, cause)))
    assert isinstance(copied[1], RaisedElsewhere) and "Odd: this went" in str(copied[1])


def test_a_process_that_is_killed_is_told_with_what_helps(tmp_path: Path) -> None:
    message = (
        r"^leaving: lora rank=2 targets=0: the process of the run was ended by SIGKILL, as the system does when memory "
        r"runs out; smaller batches and shorter rows need less\. The same command goes on after the last finished "
        r"run\.$"
    )
    with pytest.raises(ValueError, match=message):
        OwnProcess().do(runs_elsewhere.be_killed, runs_elsewhere.Leaving(), order(tmp_path), Told())


def test_an_interrupt_ends_the_process_of_the_run(tmp_path: Path) -> None:
    told = Told(stop=True)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        OwnProcess().do(runs_elsewhere.wait, runs_elsewhere.Leaving(), order(tmp_path), told)
    with pytest.raises(ProcessLookupError, match="No such process"):
        os.kill(int(told.heard[0]), 0)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert "TQDM_POSITION" not in os.environ


def test_a_task_that_cannot_be_sent_is_refused_before_a_process_starts(tmp_path: Path) -> None:
    class Local(runs_elsewhere.Leaving):
        """No process can import it."""

    message = (
        r"the task leaving cannot be sent to a process of its own .*Local.* compare\(…, runner=ThisProcess\(\)\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        OwnProcess().do(runs_elsewhere.wait, Local(), order(tmp_path), Told())


def test_ctrl_c_at_a_terminal_reaches_both_processes_and_is_told_once(tiny_encoder: Path, tmp_path: Path) -> None:
    rows = [{"text": f"turn the light {('on', 'off')[i % 2]} {i}", "label": ("on", "off")[i % 2]} for i in range(40)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "lorakit", "compare", "--model", tiny_encoder, "--data", tmp_path / "d.jsonl"]
    command += ["-o", tmp_path / "out", "--methods", "bitfit", "--lr", "1e-3", "--epochs", "1", "--dtype", "float32"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    ledger, deadline = tmp_path / "out" / "runs.jsonl", time.monotonic() + 120
    while not ledger.is_file() and time.monotonic() < deadline:  # the next run is about to begin
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)  # until no process has its end of the pipes
    assert process.returncode == 130, err
    _, _, told = err.partition("d: bitfit, rate 0.001, seed 0: test: ")
    assert [line for line in told.splitlines() if line][1:] == ["interrupted"], err
    assert [json.loads(line)["alone"] for line in ledger.read_text().splitlines()] == [True]
