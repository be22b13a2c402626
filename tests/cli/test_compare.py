"""`lorakit compare` as a person runs it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.cli.main import main
from lorakit.study.comparison import one_run as module
from lorakit.training import preflight

pytestmark = pytest.mark.usefixtures("few_objects", "runs_in_this_process")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "lights.jsonl"
    rows = [{"text": f"turn the light {('on', 'off')[i % 2]} {i}", "label": ("on", "off")[i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Ran:
    """The results of a command."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: object) -> None:
        capsys.readouterr()
        self.code = main(["compare", *map(str, words)])
        self.out, self.err = capsys.readouterr()
        assert "Traceback" not in self.out + self.err


def words(model: Path, data: Path, out: Path, *more: object) -> list[object]:
    few = ("--seeds", 2, "--trials", 2, "--epochs", 1, "--batch-size", 8, "--dtype", "float32")
    return ["--model", model, "--data", data, "--output-dir", out, "--methods", "bitfit,lora rank=2", *few, *more]


def never(*_: object, **__: object) -> None:
    raise AssertionError("a training that was not asked for")


def test_help_lists_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    ran = Ran(capsys, "--help")
    assert (ran.code, ran.err) == (0, "")
    for flag in ("--model", "--methods", "--seeds", "--trials", "--dry-run", "--learning-rate", "--json", "--config"):
        assert f"{flag}" in ran.out
    assert "--tasks" not in ran.out and "--published" not in ran.out  # they are settings of a file only
    assert max(map(len, ran.out.splitlines())) <= 110


def test_a_dry_run_says_the_plan_and_writes_nothing(
    tiny_encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fit", never)
    ran = Ran(capsys, *words(tiny_encoder, data, tmp_path / "out", "--dry-run"))
    assert (ran.code, ran.err) == (0, "")
    for line in (
        f"{data}: classification; rows: train 32, valid 4, test 4; 4 steps a run",
        "reported: accuracy, matthews; rates chosen by loss on validation rows",
        "  lora rank=2           512 parameters and 66 of the head",
        "at most 6: 2 seeds, at most 2 learning rates for a method on a task",
        "how long they take is told after the first steps",
    ):
        assert line in ran.out.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == [data.name]


def test_a_method_that_memory_does_not_hold_is_told_before_anything_is_made(
    tiny_encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(tiny_encoder, num_labels=2)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    least = 4 * weights + buffers  # float32: the weight, its gradient and AdamW's two moments
    monkeypatch.setattr(module, "fit", never)
    command = words(tiny_encoder, data, tmp_path / "out", "--methods", "bitfit,full")
    monkeypatch.setattr(preflight, "memory_of", lambda device: least - 1)
    for more in ([], ["--json"], ["--dry-run"]):
        ran = Ran(capsys, *command, *more)
        assert ran.code == 1 and ran.err.count("\n") == 1
        assert re.match(
            r"error: full on \w+ needs at least .* of memory, and this machine has .*--ignore-memory", ran.err
        )
    assert [path.name for path in tmp_path.iterdir()] == [data.name]
    assert Ran(capsys, *command, "--dry-run", "--ignore-memory").code == 0
    monkeypatch.setattr(preflight, "memory_of", lambda device: least)
    assert Ran(capsys, *command, "--dry-run").code == 0


def test_a_whole_comparison_and_the_same_again(
    tiny_encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = words(tiny_encoder, data, out)
    ran = Ran(capsys, *command)
    assert ran.code == 0
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        *("runs.jsonl", "machine.json", "config.yaml"),
        *("compare.json", "compare.md", "compare.html", "compare-lights.svg"),
    }
    found = json.loads((out / "compare.json").read_text())
    runs = {run["key"]: run for run in map(json.loads, (out / "runs.jsonl").read_text().splitlines())}
    assert len(runs) == 6
    table = ran.out[ran.out.index("Model: ") :]
    assert [row["method"] for row in found["rows"]] == ["bitfit", "lora rank=2"]
    for row in found["rows"]:
        of_row = [run for run in runs.values() if run["method"] == row["method"]]
        values = [run["test"]["accuracy"] for run in of_row if run["learning_rate"] == row["learning_rate"]]
        assert row["scores"]["accuracy"]["values"] == values and len(values) == 2
        # in the table, in the Markdown and on the page
        shown = f"{row['scores']['accuracy']['mean']:.1f}"
        for text in (table, (out / "compare.md").read_text(), (out / "compare.html").read_text()):
            cells = (row["method"], f"{row['parameters']:,}", shown)
            of_table = text.replace("</tr>", "\n").splitlines()
            assert any(all(cell in line for cell in cells) for line in of_table)
    assert table.rstrip().splitlines()[-1].startswith("written: ")
    told = ran.err.splitlines()  # one line for each run
    assert len(told) == 6 and all(re.search(r" s; at most \d more runs?, about ", line) for line in told[:-1]), told
    assert told[-1].endswith(" s")
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["data"], config["methods"], config["seeds"]) == (str(data), ["bitfit", "lora rank=2"], 2)

    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    monkeypatch.setattr(module, "fit", never)
    for again in (command, [*command, "--so-far"], ["-c", out / "config.yaml"], [out / "config.yaml"]):
        second = Ran(capsys, *again)
        assert (second.code, second.err) == (0, "") and second.out.endswith(table)
        assert "at most 6: 2 seeds" in second.out and "\nall are finished\n" in second.out
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_json_is_all_that_standard_output_gets(
    tiny_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"light {i}", "completion": "turn on"} for i in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    ran = Ran(capsys, *words(tiny_lm, data, out, "--json", "--max-new-tokens", 3, "--seeds", 1, "--trials", 1))
    assert ran.code == 0
    found = json.loads(ran.out)
    assert ran.out == (out / "compare.json").read_text()
    assert [row["method"] for row in found["rows"]] == ["lora rank=2"]
    assert [left["method"] for left in found["left_out"]] == ["bitfit"]


def test_an_interrupt_ends_with_130_and_is_gone_on_from(
    tiny_encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command, made, fit = words(tiny_encoder, data, tmp_path / "out"), [], vars(module)["fit"]

    def twice(*arguments: Any, **named: Any) -> Any:
        made.append(named["seed"])
        if len(made) == 3:
            raise KeyboardInterrupt
        return fit(*arguments, **named)

    monkeypatch.setattr(module, "fit", twice)
    ran = Ran(capsys, *command)
    assert ran.code == 130 and ran.err.endswith("interrupted\n")
    assert not (tmp_path / "out" / "compare.json").exists()
    assert Ran(capsys, *command).code == 0
    assert (tmp_path / "out" / "compare.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "missing: --model path/to/model --output-dir out   (or give them in a YAML file: --config FILE)"),
        (("--methdos", "full"), "unknown argument '--methdos'. Did you mean '--methods'? (lorakit compare --help)"),
        (("--model", "m", "-o", "o"), "missing: --data data.jsonl   (or tasks: in a YAML file)"),
        (("--model", "m", "-o", "o", "--data", "d", "--methods", "lra"), "--methods: unknown method 'lra'. Did you"),
        (("--model", "m", "-o", "o", "--data", "d", "--methods", "full,full"), "methods: 'full' is named twice."),
        (("--model", "m", "-o", "o", "--data", "d", "--seeds", "x"), "--seeds: expected a whole number, found 'x'."),
        (("no.yaml",), "--config no.yaml: no such file or folder."),
        (("a.yaml", "-c", "b.yaml"), "two files of settings, a.yaml and b.yaml; give one."),
        (("a.yaml", "b.yaml"), "unexpected 'b.yaml'."),
    ],
)
def test_usage_errors_are_one_line_and_exit_2(
    flags: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = Ran(capsys, *flags)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"lorakit compare: {message}") and ran.err.count("\n") == 1
    assert [*tmp_path.iterdir()] == []


def test_failures_are_one_line_and_exit_1(
    tiny_encoder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fit", never)
    taken = tmp_path / "taken"
    taken.write_text("mine")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "label": "x"}\n{"text": "a"}\n{"text": "b", "label": "y"}\n')
    out = tmp_path / "out"
    for command, message in [
        (words(tiny_encoder, data, taken), f"error: --output-dir {taken} is a file."),
        (
            words(tiny_encoder, tmp_path / "lihgts.jsonl", out),
            f"error: no data set at {tmp_path}/lihgts.jsonl: no such",
        ),
        (words(tmp_path / "no-model", data, out), f"error: no model at {tmp_path}/no-model: no such file or folder."),
        (words(tiny_encoder, bad, out), "error: bad.jsonl:2: "),
        (words(tiny_encoder, data, out, "--metrics", "blue"), "error: unknown metric 'blue'. Did you mean 'bleu'?"),
        (words(tiny_encoder, data, out, "--metrics", "bleu"), "error: bleu is for texts; this task is classification."),
    ]:
        ran = Ran(capsys, *command)
        assert (ran.code, ran.out) == (1, "")
        assert ran.err.startswith(message) and ran.err.count("\n") == 1, ran.err
        assert not out.exists() and taken.read_text() == "mine"
