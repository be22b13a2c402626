"""What is printed in terminals of 80 and 60 columns, with and without colours, and where nothing can move."""

import json
import re
import unicodedata
from pathlib import Path

import pytest

from lorakit.cli.main import main
from lorakit.training import generation
from lorakit.training.bars import Bar
from lorakit.training.report import Evaluation, Sample, comparison
from terminals import terminal

pytestmark = pytest.mark.usefixtures("few_objects")

_METER = re.compile(r"(\d+)%\|([^|]*)\|")
CALL = json.dumps(
    {
        "name": "set_alarm",
        "arguments": {"time": "seven on monday", "room": "the kitchen on the left", "say": 'wake up, "all" of you'},
        "days": [1, 2, 3],
    }
)


@pytest.mark.parametrize(
    ("width", "variables", "further"),
    [
        (80, {}, []),
        (60, {"NO_COLOR": "1"}, []),
        (60, {"TERM": "dumb"}, []),
        (60, {"NO_COLOR": "1"}, ["--sweep", "learning_rate=1e-4,1e-3"]),
        (60, {"TERM": "dumb"}, ["--auto", "2 runs"]),
    ],
    ids=["80", "60", "dumb", "sweep", "auto"],
)
def test_a_run_in_a_narrow_terminal(
    width: int, variables: dict[str, str], further: list[str], tiny_lm: Path, tmp_path: Path, monkeypatch
) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps({"prompt": f"alarm {i}", "completion": CALL}) + "\n" for i in range(8)))
    words = ["train", "--model", str(tiny_lm), "--data", str(data), "--output-dir", str(out), "--targets", "q_proj"]
    words += [
        "--batch-size",
        "2",
        "--epochs",
        "1",
        "--holdout",
        "0.25",
        "--max-new-tokens",
        "4",
        "--logging-steps",
        "1",
        *further,
    ]
    monkeypatch.setenv("TERM", "xterm")
    with terminal(width) as screen:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert main(words) == 0
    coloured, moves = not variables, "TERM" not in variables
    assert ("\x1b[32m" in screen.text) == coloured and (coloured or "\x1b[" not in screen.text)
    assert ("it learns to write what is in green" in " ".join(screen.text.split())) == coloured
    assert "\x1b" not in (out / "report.html").read_text()

    bars = [frame for frame in screen.frames if _METER.search(frame) and "Loading weights" not in frame]
    assert bool(bars) == moves and ("step 3/3" in screen.text) != moves
    for frame in bars:
        assert len(frame) <= width
        assert len(_METER.search(frame)[2]) >= 10  # type: ignore[index]
    if moves:
        assert any("3/3" in frame and "loss=" in frame and "eval_loss=" in frame for frame in bars)

    # The row is shown as the model reads it, commands are to be copied, a table has its own width, paths are whole.
    free = re.compile(r"⟦|\x1b|  lorakit |module |model\.layers|trainable params|\S* *\S*" + re.escape(str(tmp_path)))
    assert not [line for line in screen.lines if len(line) > width and not free.match(line)]


@pytest.mark.parametrize("width", [40, 50, 60, 80, 120, 200])
@pytest.mark.parametrize("doing", ["training", "long: lora rank=4 targets=q_proj+v_proj, rate 0.001, seed 0", ""])
@pytest.mark.parametrize("values", ["loss=1.23, eval_loss=2.34", None])
def test_a_bar_keeps_ten_cells(width: int, doing: str, values: str | None) -> None:
    """What tells most stays longest: how far it is, then the last values."""
    line = Bar.format_meter(1234, 5000, 370.0, ncols=width, prefix=doing, postfix=values, unit="step")
    assert len(line) == width
    assert len(_METER.search(line)[2]) >= 10  # type: ignore[index]
    assert "24%|" in line or "25%|" in line
    assert "1234/5000 [" in line
    if values and width >= 80:
        assert values in line
    if width >= 120:
        assert doing[:12] in line and "step/s" in line
    if width == 200:
        assert doing in line


@pytest.mark.parametrize("width", [60, 80, 120])
def test_json_is_broken_between_its_items_and_other_text_between_words(width: int, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    prose = "the light in the kitchen is on, and the one in the hall is off since monday at seven " * 2
    shown = comparison(Evaluation(1, "valid", {}, (Sample("what?", prose, CALL[:-30], CALL),)))
    lines = shown.splitlines()
    assert all(len(line) <= width for line in lines)
    assert "seven the light" in " ".join(shown.split())
    for text in re.findall(r'"(?:[^"\\]|\\.)*"', CALL):
        assert any(text in line for line in lines), text
    starts = [index for index, line in enumerate(lines) if line.startswith("    expected")]
    assert " ".join(line[14:].strip() for line in lines[starts[0] :]) == CALL


def test_an_answer_cannot_command_the_terminal() -> None:
    family, persian = "\U0001f469\u200d\U0001f467", "می\u200cخواهم"  # joined and kept apart by characters without width
    sample = Sample("a\x1b]0;title\x07", "b\x1b[2J", f"c\x9bd {family}", f"e {persian}")
    shown = comparison(Evaluation(1, "valid", {}, (sample,)))
    assert not any(unicodedata.category(character) == "Cc" for character in shown.replace("\n", ""))
    assert all(text in shown for text in ("a�]0;title�", "b�[2J", f"c�d {family}", persian))


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_an_answer_that_is_streamed_cannot_either(verb: str, tiny_lm: Path, monkeypatch, capsys) -> None:
    """A pipe gets the answer as it is."""
    answer = "on\x1b[2J\n\tand \x07off\r"
    monkeypatch.setattr(generation, "stream", lambda *_, **__: iter([answer[:4], answer[4:]]))
    asked = iter(["turn it on", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    words = [verb, "--model", str(tiny_lm), *(["--prompt", "turn it on"] if verb == "generate" else [])]
    with terminal(80) as screen:
        assert main(words) == 0
    assert "on�[2J\n\tand �off�\n" in screen.text and "\x1b[2J" not in screen.text
    asked = iter(["turn it on", "/quit"])
    assert main(words) == 0
    assert answer + "\n" in capsys.readouterr().out
