"""Settings that one batch cannot serve: `--sweep` and `--auto` train them one after another, each as alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorakit
from lorakit.cli.main import main
from lorakit.training import auto_settings
from lorakit.training.config import TrainConfig
from lorakit.training.interrupt import Interrupted
from lorakit.training.loop import train
from lorakit.training.one_pass_trainer import OnePassTrainer
from lorakit.training.trainers import ClassifierTrainer

pytestmark = pytest.mark.usefixtures("few_objects")

USUAL: dict[str, Any] = dict(
    batch_size=5, epochs=2.0, eval_samples=4, max_new_tokens=2, holdout=0.2, logging_steps=1, dtype="float32"
)


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    path = tmp_path / "d.jsonl"
    lines = [{"prompt": f"turn {i % 6}" * (1 + i % 2), "completion": f"on {i % 3}"} for i in range(22)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainConfig(str(tiny_lm), str(path), str(tmp_path / "out"), targets=("q_proj", "down_proj"), **USUAL)


@pytest.fixture
def classifier(tiny_encoder: Path, tmp_path: Path) -> TrainConfig:
    path = tmp_path / "labels.jsonl"
    lines = [
        {"text": f"turn the light {'on' if i % 2 else 'off'} {i}", "label": ["dark", "light"][i % 2]} for i in range(30)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TrainConfig(str(tiny_encoder), str(path), str(tmp_path / "out"), targets=("query", "value"), **USUAL)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that an adapter's files hold."""
    adapter = lorakit.Adapter.load(folder)
    found = {f"{name} {side}": getattr(own, side) for name, own in adapter.updates.items() for side in "AB"}
    found |= {f"{name} magnitude": own.magnitude for name, own in adapter.updates.items() if own.magnitude is not None}
    found |= {f"rows of {name}": own.values for name, own in adapter.token_rows.items()}
    return found | dict(adapter.trained)


def lines_in(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same(folder: Path, alone: Path) -> None:
    expected, got = tensors(alone), tensors(folder)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6)
    mine, own = lines_in(folder), lines_in(alone)
    assert len(mine) == len(own)
    for line, other in zip(mine, own, strict=True):
        for key in ("step", "epoch", "loss", "eval_loss"):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-6), key


@pytest.mark.parametrize(
    "further",
    [
        {"dora": True},
        {"bias": "all"},
        {"also_train": ("norm",)},
        {"new_tokens": ("<on>",)},
        {"packing": True, "max_seq_length": 64},
        {"dora": True, "dropout": 0.3, "init": "pissa", "gradient_checkpointing": True},
    ],
    ids=lambda further: "+".join(further),
)
def test_what_a_batch_cannot_serve_is_trained_one_after_another(further: dict[str, Any], config: TrainConfig) -> None:
    config = dataclasses.replace(config, **further)
    out = Path(config.output_dir)
    train(dataclasses.replace(config, sweep="learning_rate=1e-3,2e-2", eval_samples=0))
    found = json.loads((out / "sweep.json").read_text())
    assert len(found["rows"]) == 2
    for row in found["rows"]:
        alone = out.parent / row["name"]
        rate = float(row["name"].removeprefix("learning_rate="))
        train(dataclasses.replace(config, learning_rate=rate, output_dir=str(alone), eval_samples=0))
        assert_same(out / "sweep" / row["name"], alone)
        logged = lines_in(alone)
        assert row["heldout"] == pytest.approx([line["eval_loss"] for line in logged if "eval_loss" in line][-1])
        assert row["loss"] == pytest.approx([line["loss"] for line in logged if "loss" in line][-1])
    assert_same(out, out.parent / found["best"])
    assert not list(out.glob("checkpoint-*"))


def test_a_classifier_is_swept_with_its_head(classifier: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(classifier.output_dir)
    train(dataclasses.replace(classifier, sweep="learning_rate=1e-3,3e-2,1e25"))
    said = capsys.readouterr().out
    found = json.loads((out / "sweep.json").read_text())
    good, other, bad = found["rows"]
    assert good["name"] == found["best"] and good["heldout"] < other["heldout"]
    assert bad["name"] == "learning_rate=1e+25" and bad["fate"].startswith("diverged at step ")
    alone = out.parent / "alone"
    rate = float(found["best"].removeprefix("learning_rate="))
    train(dataclasses.replace(classifier, learning_rate=rate, output_dir=str(alone)))
    assert_same(out, alone)
    assert any(name.startswith("classifier") for name in tensors(out))
    kept, own = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (out, alone))
    assert {**kept, "output_dir": own["output_dir"]} == own
    results, plain = (json.loads((folder / "results.json").read_text()) for folder in (out, alone))
    assert results["scores"] == plain["scores"] and results["trained_parameters"] == plain["trained_parameters"]
    assert all(row["name"] in text for row in found["rows"] for text in (said, (out / "report.html").read_text()))
    for folder in (out, out / "sweep" / other["name"]):  # the others are complete in themselves too
        assert main(["generate", "--model", str(folder), "--prompt", "turn the light on 1"]) == 0
        said = capsys.readouterr().out
        assert "light" in said and "%" in said
    assert yaml.safe_load((out / "sweep" / other["name"] / "config.yaml").read_text())["sweep"] is None


def test_a_classifier_is_searched_and_an_interrupted_search_goes_on(
    classifier: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_settings, "_START", 1e-3)
    out, again = Path(classifier.output_dir), Path(classifier.output_dir).with_name("again")
    searching = dataclasses.replace(classifier, auto="4 runs")
    begun, passes = ClassifierTrainer.train, 0

    def counted(self: Any, *args: Any, **named: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return begun(self, *args, **named)

    monkeypatch.setattr(OnePassTrainer, "train", None)
    monkeypatch.setattr(ClassifierTrainer, "train", counted)
    with pytest.raises(Interrupted, match="auto holds what was tried"):
        train(searching)
    train(dataclasses.replace(searching, resume="auto"))
    assert passes == 3 + 2  # one of four was interrupted and made again
    told = json.loads((out / "auto.json").read_text())
    losses = {row["name"]: row["heldout"] for row in told["rows"]}
    assert len(losses) == 4 and losses[told["best"]] == min(losses.values())
    kept = yaml.safe_load((out / "config.yaml").read_text())
    assert told["best"] == f"learning_rate={kept['learning_rate']:g} rank={kept['rank']}"
    train(TrainConfig(**{**kept, "output_dir": str(again)}))
    assert_same(out, again)
    assert not list(out.glob("checkpoint-*")) and not (out / "auto").exists()


def test_a_classifier_is_searched_within_a_time(classifier: TrainConfig, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(classifier.output_dir)
    train(dataclasses.replace(classifier, auto="1h", rank=4, epochs=1.0))
    said = capsys.readouterr().out
    assert "memory is planned for 1 adapter of rank 4" in said and " for each run of " in said
    told = json.loads((out / "auto.json").read_text())
    assert told["ended"] == "no neighbour of the best setting is better"
    assert min(row["heldout"] for row in told["rows"] if not row["fate"]) == pytest.approx(
        json.loads((out / "results.json").read_text())["losses"]["held-out"]
    )
