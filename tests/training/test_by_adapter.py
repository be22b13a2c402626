"""Rows that name their adapter: each adapter is what its rows give alone."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.cli.main import main
from lorakit.training.config import TrainConfig
from lorakit.training.data import read_data
from lorakit.training.loop import train
from lorakit.training.rows import DataError
from lorakit.training.settings import UsageError

pytestmark = pytest.mark.usefixtures("few_objects")

COUNTS = {"fr": 23, "de": 9, "style.2": 14}


def line(name: str, index: int) -> dict[str, str]:
    return {"prompt": f"{name} {index % 7}" * (1 + index % 3), "completion": f"on {index % 3}", "adapter": name}


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Rows of three adapters in turns, so that none has its own in one piece."""
    return [line(name, index) for index in range(23) for name, count in COUNTS.items() if index < count]


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> TrainConfig:
    usual: dict[str, Any] = dict(batch_size=3, epochs=2.0, eval_samples=6, holdout=0.2, logging_steps=1)
    usual |= dict(dtype="float32", targets=("q_proj", "down_proj", "lm_head"), warmup_ratio=0.2, learning_rate=1e-2)
    return TrainConfig(str(tiny_lm), written(tmp_path / "d.jsonl", rows), str(tmp_path / "out"), **usual)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    found = lorakit.Adapter.load(folder).updates
    return {f"{name} {side}": getattr(own, side) for name, own in found.items() for side in "AB"}


def test_each_adapter_is_what_its_rows_give_alone(
    config: TrainConfig, rows: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unlike lengths, and an accumulation that an epoch does not fill: rows, order, schedule, held-out rows."""
    config = dataclasses.replace(config, gradient_accumulation_steps=2)
    out = train(config)
    said = capsys.readouterr().out
    assert "each of which learns its own: fr 23, de 9, style.2 14" in said and "of 6 rows for each adapter" in said
    newest: dict[str, float] = {}
    page = (out / "report.html").read_text()
    for logged in (out / "metrics.jsonl").read_text().splitlines():
        newest |= (found := json.loads(logged))
        for key in ("loss", "eval_loss"):
            each = [value for name, value in found.items() if name.startswith(f"{key} ")]
            assert (key in found) == bool(each) and found.get(key, 0) == pytest.approx(
                sum(each) / max(len(each), 1), abs=2e-5
            )
    for name in COUNTS:
        own = [row for row in rows if row["adapter"] == name]
        alone = tmp_path / f"{name} alone"
        data = written(tmp_path / "own.jsonl", [{key: row[key] for key in ("prompt", "completion")} for row in own])
        train(dataclasses.replace(config, data=data, output_dir=str(alone), eval_samples=0))
        expected, got = factors(alone), factors(out / "adapters" / name)
        assert expected.keys() == got.keys()
        for key, value in expected.items():
            torch.testing.assert_close(got[key], value, rtol=0, atol=2e-4)
            assert value.abs().max() > 1e-3
        lines = [json.loads(logged) for logged in (alone / "metrics.jsonl").read_text().splitlines()]
        evaluated = [found["eval_loss"] for found in lines if "eval_loss" in found]
        assert newest[f"eval_loss {name}"] == pytest.approx(evaluated[-1], abs=1e-4)
        trained = [found["loss"] for found in lines if "loss" in found]
        assert newest[f"loss {name}"] == pytest.approx(trained[-1], abs=1e-4)
        cells = re.search(rf">{name}</td>(.*?)</tr>", page, re.DOTALL)
        assert cells is not None
        shown = dict(re.findall(r'data-head="([^"]+)">\s*([^<]+?)\s*<', cells[1]))
        assert float(shown["training loss"]) == pytest.approx(newest[f"loss {name}"], rel=1e-2)
        assert float(shown["held-out loss"]) == pytest.approx(newest[f"eval_loss {name}"], rel=1e-2)
        assert int(shown["rows"]) > 0 and "→" in shown["exact match: base → adapter"]
    _used_as_a_folder_of_adapters(out, config, capsys)


def _used_as_a_folder_of_adapters(out: Path, config: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    for name in COUNTS:
        own = out / "adapters" / name
        assert {path.name for path in own.iterdir()} >= {"README.md", "style.json", "tokenizer.json", "config.yaml"}
    assert "| adapters/fr |" in (out / "README.md").read_text()
    assert "fr, de, style.2; of each: rank" in (out / "report.html").read_text()
    assert main(["eval", "--model", str(out), "--data", config.data, "--max-new-tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*COUNTS, "all rows"))
    assert main(["generate", "--model", str(out), "--prompt", "fr 1", "--max-new-tokens", "2"]) == 0
    assert main(["merge", "--model", str(out), "--output-dir", str(out) + "-m"]) == 1
    assert "holds several adapters: de, fr, style.2. Name the folder of one" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="it holds a finished run"):
        train(config)
    assert main(["runs", str(out)]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("/")}
    assert listed == {str(out)}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"prompt": "a", "completion": "b"}, r"d.jsonl:47: names no adapter, and other rows do"),
        (
            {"prompt": "a", "completion": "b", "adapter": "a/b"},
            r"d.jsonl:47: adapter: expected a name of letters.*'a/b'",
        ),
        ({"prompt": "a", "completion": "b", "adapter": 3}, r"expected a name of letters, .*found 3"),
        ({"prompt": "a", "completion": "b", "adapter": "none"}, r"that is not 'none'"),
        ({"prompt": "a", "completion": "b", "adapter": ".."}, r"found '\.\.'"),
    ],
)
def test_rows_that_name_no_adapter_are_refused(
    config: TrainConfig, rows: list[dict[str, Any]], extra: dict[str, Any], message: str
) -> None:
    written(Path(config.data), [*rows, extra])
    with pytest.raises(DataError, match=message):
        train(config)


def test_a_held_out_row_of_an_unknown_adapter_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "train.jsonl", rows)
    written(tmp_path / "data" / "valid.jsonl", [line("fr", 1), line("it", 2)])
    with pytest.raises(DataError, match=r"valid.jsonl:2: no training row is for the adapter 'it'"):
        read_data(str(tmp_path / "data"), adapters=None)
    written(tmp_path / "data" / "train.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"train.jsonl:1: names no adapter, and other rows do"):
        read_data(str(tmp_path / "data"), adapters=None)


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"dora": True, "bias": "all"}, "which is not possible with --dora, --bias: leave"),
        ({"sweep": "rank=2,4"}, "--sweep trains every adapter on all rows"),
        ({"resume": "auto"}, "nothing to --resume"),
        ({"packing": True}, "which is not possible with --packing"),
    ],
)
def test_what_several_adapters_cannot_share_is_refused(
    config: TrainConfig, further: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(dataclasses.replace(config, **further))
