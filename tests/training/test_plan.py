"""The planned memory and steps of a run, before it starts."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import plan as benchmark
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lorakit
import models
from lorakit.training.config import TrainConfig
from lorakit.training.loss import frozen_head, label_losses, labelled
from lorakit.training.memory import Storages, forget_peak, peak_memory, step_storages
from lorakit.training.plan import Plan, make_plan
from lorakit.training.prepare import prepare
from lorakit.training.start_block import start_block


def rows(path: Path) -> Path:
    path.write_text("".join(json.dumps({"prompt": f"turn {i % 6}", "completion": "on"}) + "\n" for i in range(24)))
    return path


def schedule(**settings: Any) -> Any:
    usual: dict[str, Any] = dict(batch_size=5, gradient_accumulation_steps=2, epochs=3.0, max_steps=None)
    return SimpleNamespace(**{**usual, **settings})


class Exponents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(100))

    def loss(self) -> Tensor:
        return self.w.exp().sum()


def test_the_storages_of_a_step_are_counted_to_the_byte() -> None:
    with FakeTensorMode():
        model = Exponents()
        # exp w, kept (400); its sum (4); the gradient of the sum (4); the gradient of w (400)
        step = step_storages(model, model.loss)
        assert (step.living, step.in_heap) == (808, 404)
        # the second batch finds the gradient of the first (400), and adds its own to it
        step = step_storages(model, model.loss, accumulation=2)
        assert (step.living, step.in_heap) == (1208, 404)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_blocks_with_pages_of_their_own_leave_no_holes() -> None:
    made = [(0, 2**25), (1, 2**25 - 1), (1, -(2**25 - 1)), (2, 300), (0, -(2**25)), (2, -300), (3, 77)]
    assert Storages(made, forward=6).in_heap == 2**25 - 1 + 300


def storages(fake: bool, dtype: torch.dtype) -> Storages:
    from transformers import AutoModelForCausalLM

    where = labelled(torch.tensor([[-100] * 4 + [1] * 12] * 3))
    ids = torch.ones(3, 16, dtype=torch.long)
    mask = ids.clone()
    mask[0, 15] = 0  # padding: without it a real step has no mask
    config = models.llama().config
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
        lorakit.attach(model, rank=2, dropout=0.25)
        head = frozen_head(model)
        assert head is not None
        return step_storages(
            model, lambda: label_losses(where, model, {"input_ids": ids, "attention_mask": mask}, head).sum()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fake_step_makes_the_storages_of_a_real_one(dtype: torch.dtype) -> None:
    fake, real = storages(True, dtype), storages(False, dtype)
    assert fake.living == real.living
    assert fake.in_heap == pytest.approx(real.in_heap, rel=1e-4)  # single numbers are made in other ways
    sizes = [Counter(size for _, size in step.events if abs(size) > 64) for step in (fake, real)]
    assert sizes[0] == sizes[1]


def plan(loss: Any = None) -> Plan:
    with FakeTensorMode():
        model = Exponents()
        return make_plan(model, loss or model.loss, schedule(), rows=100, tokens=1000)


def test_each_process_takes_its_share_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = plan()
    monkeypatch.setenv("WORLD_SIZE", "4")
    shared = plan()
    # 100 rows: 20 batches, or 5 for each of four processes; two batches a step, the last step of an epoch shorter
    assert (alone.steps, shared.steps) == (30, 9)
    assert alone.tokens == shared.tokens == 3000


def test_what_is_counted_and_what_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU only the step's storages, weights and moments; on a CPU also the process and a margin."""
    monkeypatch.setattr("lorakit.training.plan.resident_memory", lambda: 5_000_000)
    counted = 1208 + 400 + 800  # of two batches, see above; 100 weights; two moments of each
    found = plan()
    assert found.peak_bytes is not None
    added = found.peak_bytes - counted - 5_000_000
    assert added == 100_000_000 + round(0.33 * 404)
    with FakeTensorMode(), torch.device("meta"):
        model = Exponents()
        on_gpu = make_plan(model, model.loss, schedule(), rows=100, tokens=1000)
    assert on_gpu.peak_bytes == counted


def test_memory_that_cannot_be_planned_is_no_reason_to_stop() -> None:
    def loss() -> Tensor:
        raise RuntimeError("no such operation\nand more")

    def without_a_word() -> Tensor:
        raise NotImplementedError

    found = plan(loss)
    assert (found.peak_bytes, found.unplanned, found.steps) == (None, "RuntimeError: no such operation", 30)
    assert plan(without_a_word).unplanned == "NotImplementedError"


def test_experts_in_float32_which_fake_tensors_cannot_multiply(capfd: pytest.CaptureFixture[str]) -> None:
    ids = torch.ones(2, 4, dtype=torch.long)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = models.qwen_moe()
        found = make_plan(
            model,
            lambda: model(input_ids=ids, labels=ids).loss,
            schedule(batch_size=2, gradient_accumulation_steps=1, epochs=1.0),
            rows=2,
            tokens=8,
        )
    assert found.peak_bytes is None and found.unplanned.startswith("RuntimeError: Expected inputs of BF16 type")
    assert capfd.readouterr().err == ""


def config(model: Path, data: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(model=str(model), data=str(data), output_dir="unused", dtype="float32", **settings)


def test_the_start_block_says_why_memory_is_not_planned(
    tiny_lm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> Tensor:
        raise RuntimeError("fake tensors cannot do this")

    data = rows(tmp_path / "d.jsonl")
    assert "of memory at the peak of training" in start_block(prepare(config(tiny_lm, data)))
    monkeypatch.setattr("lorakit.training.prepare.label_losses", fails)
    block = start_block(prepare(config(tiny_lm, data)))
    assert "memory not planned (RuntimeError: fake tensors cannot do this); the time is told after" in block


def test_the_plan_sees_checkpointing_and_the_largest_batch(tiny_lm: Path, tmp_path: Path, monkeypatch) -> None:
    """With one row of 600 characters the step is larger than without it, and smaller where it is checkpointed."""
    steps: dict[str, Storages] = {}

    def spy(*arguments: Any) -> Storages:
        steps[name] = step_storages(*arguments)
        return steps[name]

    monkeypatch.setattr("lorakit.training.plan.step_storages", spy)
    data = rows(tmp_path / "d.jsonl")
    name = "short"
    prepare(config(tiny_lm, data, holdout=0.0))
    with data.open("a") as file:
        file.write('{"prompt": "' + 600 * "x" + '", "completion": "on"}\n')
    name = "long"
    prepare(config(tiny_lm, data, holdout=0.0))
    name = "checkpointed"
    prepare(config(tiny_lm, data, holdout=0.0, gradient_checkpointing=True))
    live = {name: step.living for name, step in steps.items()}
    assert live["short"] * 5 < live["long"]
    assert live["checkpointed"] < 0.7 * live["long"]
    made = {name: sum(size for _, size in step.events if size > 0) for name, step in steps.items()}
    assert made["checkpointed"] > made["long"]  # what is dropped is made again


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a peak")
def test_a_peak_is_forgotten() -> None:
    device = torch.device("cpu")
    block = torch.ones(100_000_000)
    high = peak_memory(device)
    del block
    forget_peak(device)
    assert peak_memory(device) < high - 300_000_000


@pytest.mark.slow
@pytest.mark.parametrize("setting", [benchmark.SETTINGS[2], benchmark.SETTINGS[-1]], ids=lambda own: own.name)
def test_the_plan_of_a_real_model_is_not_below_the_truth_and_a_quarter_above_at_most(
    setting: benchmark.Setting,
) -> None:
    measured, planned = benchmark.run(setting)
    assert measured <= planned <= 1.25 * measured
