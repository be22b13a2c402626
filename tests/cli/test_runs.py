"""`lorakit runs`, on folders made by hand as `train` leaves them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.main import main
from lorakit.formats.folder import OutputFolder, State
from lorakit.formats.lock import locked
from lorakit.training.config import TrainConfig
from lorakit.training.runs import runs_in, runs_table
from lorakit.training.settings import to_yaml
from lorakit.training.start import TRAINING


def run(folder: Path, state: State = "finished", score: float | None = 0.75, **settings: Any) -> Path:
    """A run of 96 held-out rows."""
    config = TrainConfig(**{"model": "models/a", "data": "rows", "output_dir": str(folder), **settings})
    out = OutputFolder(folder, TRAINING)
    out.begin({"settings": dataclasses.asdict(config)})
    (folder / "config.yaml").write_text(to_yaml(config))
    lines = [{"step": 1, "loss": 3.0}, {"step": 8, "loss": 0.125}, {"step": 8, "eval_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "lo')
    if state == "finished":
        scores = {"exact match": {"base": 0.0, "adapter": score, "adapter_interval": [score / 2, 0.9]}} if score else {}
        results = {"scores": scores, "seconds": 46.1, "peak_bytes": 1.55e9, "finished": "2026-01-31T12:00+00:00"}
        (folder / "results.json").write_text(json.dumps(results))
    out.end(state)
    return folder


def test_the_table_shows_what_differs_and_what_came_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    run(Path("runs/a"))
    run(Path("runs/more/b"), score=0.8125, rank=8, alpha=16.0, targets=("q_proj", "v_proj"), save_steps=7)
    run(Path("runs/c"), "unfinished", rank=8)
    written = Path("runs/c/config.yaml")
    written.write_text(written.read_text().replace("alpha: 32.0", "alpha: null"))  # lorakit before 0.3: 2·rank
    (tmp_path / "runs" / "notes").mkdir()
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["model: models/a", "data: rows", ""]
    rows = [[cell.strip() for cell in line.split("  ") if cell] for line in printed[3:]]
    losses, rest = ["0.125", "0.500"], ["46 s", "1.55 GB", "2026-01-31 12:00"]
    assert rows == [
        [
            "run",
            "state",
            "rank",
            "alpha",
            "targets",
            "exact match",
            *("training loss", "held-out loss", "time", "peak", "finished"),
        ],
        ["runs/a", "16", "32", "all-linear", "75.0% (37.5% to 90.0%)", *losses, *rest],
        ["runs/c", "unfinished", "8", "16", "all-linear", *losses],
        ["runs/more/b", "8", "16", "q_proj,v_proj", "81.2% (40.6% to 90.0%)", *losses, *rest],
    ]


def test_another_model_or_data_set_is_a_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a", model="models/a", data="rows")
    run(tmp_path / "b", model="models/b", data="rows")
    assert main(["runs", str(tmp_path / "b"), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("data: rows\n\nrun") and "model: " not in printed
    lines = [line.split() for line in printed.splitlines()[2:4]]
    assert [line[0] for line in lines] == ["run", str(tmp_path / "b")]  # each run once, in the order that was asked for
    assert lines[0][1] == "model" and lines[1][1] == "models/b"


def test_a_long_setting_is_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("a"), system="Reply with one tool call and nothing else.")
    run(Path("b"), alpha=32.0)
    assert main(["runs"]) == 0
    printed = capsys.readouterr().out
    assert "  Reply with one tool cal…  " in printed and "alpha" not in printed


def test_a_table_fits_the_terminal(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    for number in range(3):
        run(Path(f"run-{number}"), rank=2**number, alpha=float(number + 1), learning_rate=1e-4 * (number + 1))
    assert main(["runs"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_json_has_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a", rank=4)
    assert main(["runs", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["folder"], found["state"], found["settings"]["rank"]) == (str(tmp_path / "a"), "finished", 4)
    assert found["losses"] == {"training": 0.125, "held-out": 0.5}
    assert found["results"]["scores"]["exact match"]["adapter"] == 0.75


def test_the_state_of_each_run_is_told(tmp_path: Path) -> None:
    for name, state in (("a", "failed"), ("b", "unfinished"), ("c", "finished")):
        run(tmp_path / name, state)  # type: ignore[arg-type]
    run(tmp_path / "d", "unfinished")
    (run(tmp_path / "e") / ".lorakit" / "train.json").write_text("[]")
    old = tmp_path / "of 0.1.0"
    old.mkdir()
    (old / "config.yaml").write_text(to_yaml(TrainConfig("m", "d", "o")))
    (old / "adapter_config.json").write_text("{}")
    with locked(tmp_path / "d" / ".lorakit" / "lock"):
        found = {Path(one.folder).name: one.state for one in runs_in([str(tmp_path)])}
    assert found == {
        "a": "failed", "b": "unfinished", "c": "finished", "d": "running", "e": "unknown", "of 0.1.0": "finished"
    }  # fmt: skip


def test_a_run_that_learnt_nothing_to_show_is_still_a_line(tmp_path: Path) -> None:
    folder = run(tmp_path / "a", "unfinished")
    for name in ("config.yaml", "metrics.jsonl"):
        (folder / name).unlink()
    table = runs_table(runs_in([str(folder)]))
    assert table.head == ("run", "state") and table.rows == ((str(folder), "unfinished"),)


def test_no_folder_and_no_run_are_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path / "none")]) == 1
    assert f"{tmp_path / 'none'}: no such folder." in capsys.readouterr().err
    assert main(["runs", str(tmp_path)]) == 1
    assert f"no run of lorakit train in {tmp_path}, nor in folders up to 3 levels below." in capsys.readouterr().err
