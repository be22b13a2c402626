"""`lorakit train --sweep`: what is trained in one pass is what each setting gives alone; the best is kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lorakit
from lorakit.training.config import TrainConfig
from lorakit.training.interrupt import Interrupted
from lorakit.training.loop import train
from lorakit.training.one_pass_trainer import OnePassTrainer
from lorakit.training.settings import UsageError
from lorakit.training.sweep_settings import swept

pytestmark = pytest.mark.usefixtures("few_objects")


def rows(path: Path, count: int = 22) -> str:
    lines = [{"prompt": f"turn {i % 6}" * (1 + i % 2), "completion": f"on {i % 3}"} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def config(tiny_lm: Path, tmp_path: Path) -> TrainConfig:
    usual: dict[str, Any] = dict(batch_size=5, epochs=2.0, eval_samples=4, holdout=0.2, logging_steps=1)
    usual |= dict(dtype="float32", targets=("q_proj", "down_proj", "lm_head"), weight_decay=0.01)
    return TrainConfig(str(tiny_lm), rows(tmp_path / "d.jsonl"), str(tmp_path / "out"), **usual)


def factors(folder: Path) -> dict[str, torch.Tensor]:
    found = lorakit.Adapter.load(folder).updates
    return {f"{name} {side}": getattr(own, side) for name, own in found.items() for side in "AB"}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_adapter_is_what_its_settings_give_alone(config: TrainConfig, accumulation: int, capsys: Any) -> None:
    config = dataclasses.replace(config, gradient_accumulation_steps=accumulation)
    out = Path(config.output_dir)
    train(dataclasses.replace(config, sweep="learning_rate=1e-3,2e-2 rank=2,5"))
    said = capsys.readouterr().out
    found = json.loads((out / "sweep.json").read_text())
    assert found["rows"][0]["name"] == found["best"]
    assert [row["heldout"] for row in found["rows"]] == sorted(row["heldout"] for row in found["rows"])
    names = {f"learning_rate={rate:g} rank={rank}": (rate, rank) for rate in (1e-3, 2e-2) for rank in (2, 5)}
    assert {row["name"] for row in found["rows"]} == set(names)
    for row in found["rows"]:
        rate, rank = names[row["name"]]
        alone = out.parent / row["name"]
        train(dataclasses.replace(config, learning_rate=rate, rank=rank, output_dir=str(alone)))
        expected, got = factors(alone), factors(out / "sweep" / row["name"].replace(" ", ","))
        assert expected.keys() == got.keys()
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=2e-4)
            assert expected[name].abs().max() > 1e-3
        lines = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
        assert row["heldout"] == pytest.approx(evaluated[-1], abs=1e-4)
        assert row["loss"] == pytest.approx([line["loss"] for line in lines if "loss" in line][-1], abs=1e-4)
        assert f"\n{row['name']} " in said
    best = out.parent / found["best"]
    for name, value in factors(best).items():
        torch.testing.assert_close(factors(out)[name], value, rtol=0, atol=2e-4)
    kept, own = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (out, best))
    assert {**kept, "output_dir": own["output_dir"]} == own
    assert f"The held-out loss chose {found['best']}." in said and "exact match" in said
    told = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert all(row["name"] in text for row in found["rows"] for text in told)
    # The score is on the rows that chose the settings, and every place says so.
    assert all("the settings were chosen by the loss on these rows" in text for text in (said, *told))
    swept, single = (json.loads((folder / "results.json").read_text()) for folder in (out, best))
    assert swept["trained_parameters"] == single["trained_parameters"]
    assert swept["losses"] == pytest.approx(single["losses"], abs=1e-4) and len(single["losses"]) == 2


def test_one_that_diverges_leaves_the_others_alone(config: TrainConfig) -> None:
    out = Path(config.output_dir)
    train(dataclasses.replace(config, sweep="learning_rate=1e-3,1e25", eval_samples=0))
    found = json.loads((out / "sweep.json").read_text())
    good, bad = found["rows"]
    assert (good["name"], good["fate"]) == ("learning_rate=0.001", "")
    assert bad["name"] == "learning_rate=1e+25" and bad["fate"].startswith("diverged at step ")
    assert bad["heldout"] is None and not (out / "sweep" / "learning_rate=1e+25").exists()
    alone = out.parent / "alone"
    train(dataclasses.replace(config, learning_rate=1e-3, eval_samples=0, output_dir=str(alone)))
    for name, value in factors(alone).items():
        torch.testing.assert_close(factors(out)[name], value, rtol=0, atol=2e-4)


def test_dropout_pissa_and_rslora_are_swept_too(config: TrainConfig) -> None:
    out = Path(config.output_dir)
    train(
        dataclasses.replace(
            config, sweep="dropout=0,0.2 init=kaiming,pissa rslora=true,false", eval_samples=0, holdout=0.0
        )
    )
    found = json.loads((out / "sweep.json").read_text())
    assert len(found["rows"]) == 8 and all(row["heldout"] is None and row["loss"] > 0 for row in found["rows"])
    assert len({row["loss"] for row in found["rows"]}) == 8


def test_dropout_draws_the_masks_that_each_adapter_draws_alone(config: TrainConfig) -> None:
    config = dataclasses.replace(config, eval_samples=0, learning_rate=1e-2)
    out = Path(config.output_dir)
    train(dataclasses.replace(config, sweep="dropout=0.05,0.3,0"))
    ends = []
    for rate in ("0.05", "0.3", "0"):
        alone = out.parent / f"alone {rate}"
        train(dataclasses.replace(config, dropout=float(rate), output_dir=str(alone)))
        got = factors(out / "sweep" / f"dropout={rate}")
        for name, value in factors(alone).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=2e-4)
        ends.append(torch.cat([value.flatten() for value in got.values()]))
    assert (ends[0] - ends[2]).abs().max() > 1e-2 and (ends[1] - ends[2]).abs().max() > 1e-2


def test_an_interrupted_sweep_starts_over(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    training_step = OnePassTrainer.training_step

    def stopped(self: Any, *args: Any, **named: Any) -> Any:
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return training_step(self, *args, **named)

    swept = dataclasses.replace(config, sweep="rank=1,2", eval_samples=0)
    with monkeypatch.context() as patch:
        patch.setattr(OnePassTrainer, "training_step", stopped)
        with pytest.raises(Interrupted, match="before the first checkpoint: the same command starts over"):
            train(swept)
    train(swept)
    assert (Path(config.output_dir) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("sweep", "further", "message"),
    [
        ("rank", {}, "'rank': expected NAME=VALUE,VALUE, such as learning_rate=1e-4,3e-4"),
        ("rank=4,", {}, "'rank=4,': expected NAME=VALUE"),
        ("lerning_rate=1e-4,1e-3", {}, "cannot vary 'lerning_rate', only .* Did you mean 'learning_rate'"),
        ("batch_size=4,8", {}, "cannot vary 'batch_size', only learning_rate, weight_decay, rank"),
        ("rank=4", {}, "'rank=4' is one setting: give at least two values"),
        ("rank=4,x", {}, "rank: .*'x'"),
        ("rank=0,4", {}, "rank: expected at least 1"),
        ("rank=4,8", {"from_adapter": "a"}, "--sweep begins with new adapters: leave --from out"),
        ("rank=4,8", {"patience": 2}, "leave --metric, --patience, --keep out"),
        ("rank=4,8", {"resume": "auto"}, "nothing to --resume"),
    ],
)
def test_what_cannot_be_swept_is_said_before_anything_is_read(
    config: TrainConfig, sweep: str, further: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        train(dataclasses.replace(config, sweep=sweep, data="no such file", **further))


def test_names_follow_the_values() -> None:
    config = TrainConfig("m", "d", "o", sweep="--lr=1e-4,0.0003 rank=4")
    assert list(swept(config)) == ["learning_rate=0.0001 rank=4", "learning_rate=0.0003 rank=4"]
    assert [own.alpha for own in swept(dataclasses.replace(config, sweep="rank=4,8")).values()] == [32.0, 32.0]
    assert swept(dataclasses.replace(config, sweep=None)) == {}


def test_batches_that_are_added_up_have_masks_of_their_own(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch of every run by itself, as where a few rows fill a CPU."""
    config = dataclasses.replace(config, eval_samples=0, learning_rate=1e-2, gradient_accumulation_steps=2, max_steps=3)
    out = Path(config.output_dir)
    with monkeypatch.context() as patch:
        patch.setattr("lorakit.training.own_run._FULL", 1)
        train(dataclasses.replace(config, sweep="dropout=0.3,0.5"))
    for rate in ("0.3", "0.5"):
        alone = out.parent / f"alone {rate}"
        train(dataclasses.replace(config, dropout=float(rate), output_dir=str(alone)))
        got = factors(out / "sweep" / f"dropout={rate}")
        for name, value in factors(alone).items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=2e-4)
