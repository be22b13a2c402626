"""What the tests of runs in other processes send there. It is a module of its own because a process must import it."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lorakit.study.comparison.tasks import Loss, StudyTask

if TYPE_CHECKING:
    from lorakit.study.comparison.runner import Order, Watch
    from lorakit.study.methods.baselines import Applied

KEPT: list[Tensor] = []  # what runs leave behind in their process


class Leaving(StudyTask):
    """A regression by one matrix. Full fine-tuning leaves 300 MB in the process, as a library's cache might."""

    name, source, kind, head = "leaving", "random numbers", "numbers", ("1",)
    metrics, chosen_by, fingerprint = ("error",), "error", "leaving"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(24, 8, generator=generator)
        self.train = list(zip(inputs, inputs.sum(1), strict=True))  # views of two storages
        self.rows = {"train": 24, "valid": 24, "test": 24}

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)).eval()

    def blueprint(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        inputs, targets = zip(*rows, strict=True)
        return {"inputs": torch.stack(inputs), "targets": torch.stack(targets)}

    def loss(self, model: nn.Module, label_smoothing: float = 0.0) -> Loss:
        if not any("lora_A" in name for name, _ in model.named_parameters()):
            KEPT.append(torch.ones(75_000_000))

        def of(batch: dict[str, Any]) -> Tensor:
            return (model(batch["inputs"])[:, 0] - batch["targets"]).square().mean()

        return of

    def validate(self, applied: Applied) -> dict[str, float]:
        return self.test(applied)

    def test(self, applied: Applied) -> dict[str, float]:
        batch = self.collate(list(self.train))
        with torch.no_grad():
            return {"error": float((applied.model(batch["inputs"])[:, 0] - batch["targets"]).abs().mean())}

    def serve(self, model: nn.Module) -> None:
        model(torch.ones(4, 8))


class Odd(Exception):
    """It cannot be copied by pickle: it is made of two things and keeps one."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(one)


def refuse(task: StudyTask, order: Order, watch: Watch) -> None:
    watch.step()
    watch.says("refusing")
    int("no number")


def be_killed(task: StudyTask, order: Order, watch: Watch) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(task: StudyTask, order: Order, watch: Watch) -> None:
    watch.says(str(os.getpid()))
    time.sleep(300)
