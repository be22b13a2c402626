"""Adapt a network from digits to clothes: train all of it, its head, its biases, or LoRA on its convolutions.

    python benchmarks/experiments/prepare.py images
    python benchmarks/experiments/vision.py
    python benchmarks/experiments/fashion.py        15 minutes on one thread; writes results/fashion

`lorakit compare` reads text. To compare methods on anything else, define a task, as `Clothes` does here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import vision
from torch import Tensor, nn

from lorakit.study.comparison import table
from lorakit.study.comparison.config import CompareConfig, MethodConfig
from lorakit.study.comparison.files import write_results
from lorakit.study.comparison.plan import TaskPlan
from lorakit.study.comparison.processes import OwnProcess
from lorakit.study.comparison.run import compare
from lorakit.study.comparison.tasks import Loss, StudyTask, digest_of
from lorakit.study.methods.baselines import Applied
from lorakit.study.methods.naming import method_of

RESULTS = Path(__file__).resolve().parent / "results" / "fashion"
METHODS = ["full", "bitfit", "head", *(f"lora rank={rank} alpha={2 * rank} targets=conv" for rank in (1, 2, 4, 8, 16))]
SEEDS, TRIALS = 5, 5
ROWS = {"train": 4000, "valid": 1000, "test": 5000}


class Clothes(StudyTask):
    """Fashion-MNIST for the network of `vision.py`."""

    def __init__(self, rows: dict[str, int]) -> None:
        images = vision.clothes(**rows)
        self.name, self.source, self.kind, self.head = "clothes", "Fashion-MNIST", "images", "head"
        self.rows = rows
        self.train = list(zip(images["train"].pixels, images["train"].labels.tolist(), strict=True))
        self.metrics, self.chosen_by = ("accuracy",), "loss"
        self.fingerprint = digest_of(vision.CHANNELS, rows)
        self._images = images

    def model(self, seed: int) -> nn.Module:
        return vision.pretrained(seed=seed)

    def blueprint(self) -> nn.Module:
        return vision.ConvNet()

    def collate(self, rows: list[Any]) -> dict[str, Any]:
        pixels, labels = zip(*rows, strict=True)
        return {"pixels": torch.stack(pixels), "labels": torch.tensor(labels)}

    def loss(self, model: nn.Module, label_smoothing: float = 0.0) -> Loss:
        def of(batch: dict[str, Any]) -> Tensor:
            return nn.functional.cross_entropy(model(batch["pixels"]), batch["labels"], label_smoothing=label_smoothing)

        return of

    def validate(self, applied: Applied) -> dict[str, float]:
        images = self._images["valid"]
        with torch.no_grad():
            loss = nn.functional.cross_entropy(applied.model(images.pixels), images.labels)
        return {"loss": float(loss), "accuracy": 100 * vision.accuracy(applied.model, images)}

    def test(self, applied: Applied) -> dict[str, float]:
        return {"accuracy": 100 * vision.accuracy(applied.model, self._images["test"])}

    def serve(self, model: nn.Module) -> None:
        model(self._images["test"].pixels[:8])


def main() -> None:
    torch.set_num_threads(1)
    training = CompareConfig(model="digits", output_dir=str(RESULTS), batch_size=64, epochs=2)
    methods = [MethodConfig(method_of(name), training) for name in METHODS]
    found = compare(
        "a convolutional network that knows digits",
        [TaskPlan(Clothes(ROWS), methods)],
        RESULTS,
        seeds=SEEDS,
        trials=TRIALS,
        runner=OwnProcess(),
    )
    print(table.tables_text(found))
    print("written:", ", ".join(path.name for path in write_results(found, RESULTS)))


if __name__ == "__main__":
    main()
