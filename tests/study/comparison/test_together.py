"""Runs of LoRA in one pass: each learns what `fit` teaches it alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.study.comparison.config import CompareConfig, MethodConfig, TaskConfig
from lorakit.study.comparison.fit import fit
from lorakit.study.comparison.plan import plans_of
from lorakit.study.comparison.run import compare
from lorakit.study.comparison.runner import Order
from lorakit.study.comparison.table import tables_text
from lorakit.study.comparison.tasks import read_task
from lorakit.study.comparison.together import can_share, fit_together
from lorakit.study.methods.baselines import Full, LoRA

pytestmark = pytest.mark.usefixtures("few_objects")
CONFIG = CompareConfig(
    model="", output_dir="", dtype="float32", batch_size=4, epochs=2.0, label_smoothing=0.1, warmup_steps=2
)


def task_for(model: Path, folder: Path, **changes: Any) -> Any:
    rows = [{"prompt": f"turn {i % 5} " * (1 + i % 3), "completion": f"on {i % 3}"} for i in range(22)]
    folder.mkdir(exist_ok=True)
    for name, some in (("train", rows[:18]), ("valid", rows[18:]), ("test", rows[18:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    return read_task(TaskConfig("task", dataclasses.replace(CONFIG, data=str(folder), **changes), ()), str(model))


def nothing() -> None: ...


def test_each_run_is_what_it_is_alone(tiny_lm: Path, tmp_path: Path) -> None:
    """Unlike ranks, targets, inits, rates and seeds; the last one diverges, and leaves the others alone."""
    task = task_for(tiny_lm, tmp_path)
    methods = [
        LoRA(rank=2),
        LoRA(rank=5, targets=("down_proj",), rslora=True),
        LoRA(rank=3, init="pissa"),
        LoRA(rank=2),
    ]
    wanted = [
        Order("", MethodConfig(method, CONFIG), seed, rate, tmp_path)
        for method, seed, rate in zip(methods, (0, 1, 1, 2), (1e-2, 3e-3, 1e-3, 1e30), strict=True)
    ]
    steps = []
    found = fit_together(task, wanted, lambda: steps.append(1))
    assert len(steps) == 2 * 5
    for own, (tensors, fitted) in zip(wanted[:3], found[:3], strict=True):
        model = task.model(own.seed)
        torch.manual_seed(own.seed)
        applied = own.config.method.apply(model)
        begun = {name: tensor.clone() for name, tensor in applied.state_dict().items()}
        alone = fit(applied, task, CONFIG, seed=own.seed, learning_rate=own.learning_rate, step=nothing)
        expected = applied.state_dict()
        assert (fitted.steps, fitted.diverged) == (alone.steps, alone.diverged) == (10, False)
        assert tensors.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(tensors[name], value, rtol=0, atol=1e-4)
        assert max(float((expected[name] - begun[name]).abs().max()) for name in expected) > 1e-3
        applied.load_state_dict(tensors)
        applied.remove()
    assert found[3][1].diverged and found[3][1].steps < 10
    assert found[0][1].seconds == found[3][1].seconds > 0


def test_what_is_other_mathematics_is_made_alone(tiny_lm: Path, tiny_encoder: Path, tmp_path: Path) -> None:
    task = task_for(tiny_lm, tmp_path)

    def shares(method: Any, **settings: Any) -> bool:
        return can_share(task, MethodConfig(method, dataclasses.replace(CONFIG, **settings)))

    assert shares(LoRA(rank=2)) and shares(LoRA(init="pissa"))
    assert not shares(LoRA(dora=True)) and not shares(Full())
    assert not shares(LoRA(rank=2), gradient_accumulation_steps=2)


def test_a_comparison_in_one_pass_has_the_scores_of_one_without(tiny_lm: Path, tmp_path: Path) -> None:
    task_for(tiny_lm, tmp_path / "data")
    config = dataclasses.replace(
        CONFIG, model=str(tiny_lm), data=str(tmp_path / "data"), methods=("lora rank=2", "full"), seeds=3, trials=3,
        metrics=("perplexity",),
    )  # fmt: skip
    rows = []
    for one_pass in (False, True):
        folder, plans = tmp_path / f"out {one_pass}", plans_of(config)
        found = compare(config.model, plans, folder, seeds=3, trials=3, one_pass=one_pass)
        rows.append(found.rows)
        text = tables_text(found)
    for alone, shared in zip(*rows, strict=True):
        assert (alone.method, alone.learning_rate) == (shared.method, shared.learning_rate)
        assert alone.tried == pytest.approx(shared.tried, rel=1e-4)
        assert alone.scores["perplexity"].mean == pytest.approx(shared.scores["perplexity"].mean, rel=1e-4)
    assert [row.together for row in rows[0]] == [1, 1]
    made = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    most = {method: {run["together"] for run in made if run["method"] == method} for method in config.methods}
    assert most == {"lora rank=2": {1, 2, 3}, "full": {1}}  # the search, a rate beyond it, the other two seeds
    assert "Train time of lora rank=2 is that of a pass over up to 2 runs, divided by their number" in text
