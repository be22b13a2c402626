"""One training run, compared with a loop written in torch."""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.study.comparison.config import CompareConfig, TaskConfig
from lorakit.study.comparison.fit import Fitted, fit, steps_of
from lorakit.study.comparison.tasks import StudyTask, read_task
from lorakit.study.methods.baselines import Applied, Full, Houlsby, LoRA, Method

pytestmark = pytest.mark.usefixtures("few_objects")
CONFIG = CompareConfig(model="", output_dir="", dtype="float32")


def task_for(model: Path, folder: Path, train: int = 22, **changes: Any) -> Any:
    rows = [{"text": "turn the light " * (1 + i % 3) + str(i), "label": "ab"[i % 2]} for i in range(train + 4)]
    folder.mkdir(exist_ok=True)
    for name, some in (("train", rows[:train]), ("valid", rows[train:]), ("test", rows[train:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    config = dataclasses.replace(CONFIG, data=str(folder), **changes)
    return read_task(TaskConfig("task", config, ()), str(model))


def nothing() -> None: ...


def fitted(applied: Applied, task: StudyTask, seed: int = 0, rate: float = 1e-3, **settings: Any) -> Fitted:
    training = dataclasses.replace(CONFIG, **settings)
    return fit(applied, task, training, seed=seed, learning_rate=rate, step=nothing)


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(
    model: nn.Module, task: Any, seed: int, rate: float, epochs: int, batch: int, accumulated: int, decay: float,
    smoothing: float, warmup: int,
) -> float:  # fmt: skip
    """AdamW, warm-up, linear decay, gradients clipped to norm 1; returns the largest norm before clipping."""
    rows = task.train
    model.train()
    # Norms and biases do not decay.
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    bare = [p for name, p in named if name.endswith("bias") or "norm" in name.lower()]
    other = [p for name, p in named if not any(p is one for one in bare)]
    optimizer = torch.optim.AdamW(
        [{"params": other, "weight_decay": decay}, {"params": bare, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.999)
    )
    batches = []
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        of_epoch = [order[start : start + batch] for start in range(0, len(rows), batch)]
        batches += [of_epoch[start : start + accumulated] for start in range(0, len(of_epoch), accumulated)]
    norms = []
    for step, parts in enumerate(batches):
        lift = step / warmup if step < warmup else (len(batches) - step) / (len(batches) - warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate * lift
        optimizer.zero_grad()
        for part in parts:
            texts = [task.data.train[index].text for index in part]
            inputs = task.tokenizer(texts, padding=True, return_tensors="pt")
            labels = torch.tensor(["ab".index(task.data.train[index].label) for index in part])
            loss = F.cross_entropy(model(**inputs).logits, labels, label_smoothing=smoothing)
            (loss / len(parts)).backward()
        gradients = [p.grad for _, p in named if p.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        norms.append(float(norm))
        for gradient in gradients:
            gradient *= min(1.0, 1.0 / (float(norm) + 1e-6))
        optimizer.step()
    model.eval()
    return max(norms)


@pytest.mark.parametrize("method", [Full(), LoRA(rank=2, targets="all-linear"), Houlsby(bottleneck=4)], ids=str)
@pytest.mark.parametrize(
    ("batch", "accumulated", "decay", "smoothing"),
    [(4, 1, 0.0, 0.0), (3, 2, 0.1, 0.1)],  # 22 rows: the last step of an epoch is a smaller one
)
def test_training_is_a_plain_loop(
    tiny_encoder: Path, tmp_path: Path, method: Method, batch: int, accumulated: int, decay: float, smoothing: float
) -> None:
    task = task_for(tiny_encoder, tmp_path)
    model = task.model(1)
    torch.manual_seed(1)
    ours = method.apply(copy.deepcopy(model))
    torch.manual_seed(1)
    reference = method.apply(copy.deepcopy(model))
    begun = trained(reference.model)
    result = fitted(
        *(ours, task, 1, 1e-2), epochs=2.0, batch_size=batch, gradient_accumulation_steps=accumulated,
        weight_decay=decay, label_smoothing=smoothing, warmup_steps=2,
    )  # fmt: skip
    norm = by_hand(reference.model, task, 1, 1e-2, 2, batch, accumulated, decay, smoothing, warmup=2)
    assert norm > 1  # so that clipping acts
    expected, found = trained(reference.model), trained(ours.model)
    assert found.keys() == expected.keys()
    for name in found:
        if name.endswith("key.bias"):
            continue  # softmax gives it no gradient, and AdamW turns rounding errors into steps
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=2e-5)
    assert max(float((expected[name] - begun[name]).abs().max()) for name in found) > 1e-2
    assert (result.steps, result.diverged) == (2 * math.ceil(22 / (batch * accumulated)), False)
    assert not any(module.training for module in ours.model.modules())
    assert all(p.grad is None for p in ours.model.parameters())


def test_two_batches_of_8_added_up_are_one_of_16(tiny_encoder: Path, tmp_path: Path) -> None:
    task = task_for(tiny_encoder, tmp_path, train=32)
    ends = []
    for batch, accumulated in ((16, 1), (8, 2)):
        applied = Full().apply(task.model(0))
        result = fitted(applied, task, batch_size=batch, gradient_accumulation_steps=accumulated, epochs=3.0)
        assert result.steps == 6
        ends.append(trained(applied.model))
    for name, value in ends[0].items():
        if name.endswith("key.bias"):
            continue  # as above
        torch.testing.assert_close(ends[1][name], value, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        dict(epochs=3.0),
        dict(epochs=1.5),
        dict(epochs=0.3),
        dict(epochs=2.0004, batch_size=32),  # a little more than two epochs of one step
        dict(epochs=0.1, batch_size=1),  # a tenth of 30 steps is a little more than 3 in binary numbers
        dict(epochs=2.0, gradient_accumulation_steps=4),
        dict(epochs=2.0, gradient_accumulation_steps=100),
        dict(max_steps=5),
        dict(max_steps=1, epochs=9.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("train", [5, 30])
def test_the_plan_knows_the_number_of_steps(
    tiny_encoder: Path, tmp_path: Path, train: int, settings: dict[str, Any]
) -> None:
    task = task_for(tiny_encoder, tmp_path, train)
    settings = {"batch_size": 4, **settings}
    counted: list[None] = []
    applied = LoRA(rank=1).apply(task.model(0))
    training = dataclasses.replace(CONFIG, **settings)
    result = fit(applied, task, training, seed=0, learning_rate=1e-3, step=lambda: counted.append(None))
    assert result.steps == len(counted) == steps_of(task, training)


def test_a_loss_that_is_no_number_ends_the_run_and_leaves_the_next_one_alone(
    tiny_encoder: Path, tmp_path: Path
) -> None:
    task = task_for(tiny_encoder, tmp_path)
    model = task.model(0)
    base = {name: value.clone() for name, value in model.state_dict().items()}

    def ends() -> dict[str, Tensor]:
        """The result of a training run on `model`."""
        torch.manual_seed(0)
        applied = LoRA(rank=2).apply(model)
        fitted(applied, task, batch_size=4)
        found = {name: value.clone() for name, value in applied.state_dict().items()}
        applied.remove()
        return found

    undisturbed = ends()
    applied = LoRA(rank=2).apply(model)
    settings: dict[str, Any] = dict(batch_size=4, gradient_accumulation_steps=2)
    result = fitted(applied, task, rate=1e30, **settings)
    assert result.diverged
    assert 0 < result.steps < steps_of(task, dataclasses.replace(CONFIG, **settings))
    assert not model.training and all(p.grad is None for p in model.parameters())
    applied.remove()
    assert model.state_dict().keys() == base.keys()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())
    again = ends()
    assert all(torch.equal(again[name], value) for name, value in undisturbed.items())


def test_gradient_checkpointing_changes_nothing_and_ends_with_the_training(tiny_encoder: Path, tmp_path: Path) -> None:
    task = task_for(tiny_encoder, tmp_path)
    ends = []
    for checkpointing in (False, True):
        model = task.model(0)
        torch.manual_seed(0)
        applied = LoRA(rank=2).apply(model)
        fitted(applied, task, batch_size=4, epochs=1.0, gradient_checkpointing=checkpointing)
        ends.append(trained(model))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(torch.allclose(ends[1][name], value, atol=1e-6) for name, value in ends[0].items())
