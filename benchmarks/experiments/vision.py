"""Train a small convolutional network on digits (MNIST), which is then adapted to clothes (Fashion-MNIST).

    python benchmarks/experiments/prepare.py images
    python benchmarks/experiments/vision.py              under two minutes on one thread

    (n, 1, 28, 28)   six times convolution, batch norm, ReLU, two of them with stride 2   (n, 96, 7, 7)
                     mean over the image                                                  (n, 96)
                     head                                                                 (n, classes)

The program trains the network on 4,000 digits, prints its accuracy on the other 1,000, and writes its weights to
.data/models/digits.safetensors. `pretrained` returns the network with a new head, `clothes` the images to adapt it to.
Convolutions have no bias, because the norm after each would remove it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

DATA = Path(__file__).resolve().parent / ".data"
WEIGHTS = DATA / "models" / "digits.safetensors"
CLASSES = 10
CHANNELS = ((1, 32, 1), (32, 32, 2), (32, 64, 1), (64, 64, 2), (64, 96, 1), (96, 96, 1))  # in, out, stride
EPOCHS, BATCH, RATE = 8, 64, 2e-3


class Unit(nn.Module):
    """Convolution 3 × 3, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y.relu()


class ConvNet(nn.Module):
    """(n, 1, 28, 28) → logits (n, classes); about 205,000 parameters."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.features = nn.Sequential(*[Unit(*sizes) for sizes in CHANNELS])
        self.head = nn.Linear(CHANNELS[-1][1], classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images).mean((2, 3)))
        return logits


@dataclass(frozen=True)
class Images:
    """Pixels from −1 to 1, (n, 1, 28, 28), and the class of each image, (n,)."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.pixels[rows], self.labels[rows])

    def shuffled(self, seed: int) -> Images:
        return self[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]


def read(name: str, split: str) -> Images:
    """All images of "mnist" or "fashion", of "train" or "test"."""
    path = DATA / "images" / name / f"{split}.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: run python benchmarks/experiments/prepare.py images")
    tensors = safetensors.torch.load_file(path)
    return Images(tensors["images"].unsqueeze(1) / 127.5 - 1, tensors["labels"].long())


def clothes(train: int, valid: int, test: int, seed: int = 0) -> dict[str, Images]:
    """Images of Fashion-MNIST for each split, drawn by the seed. The test images are the same for every seed."""
    drawn = read("fashion", "train").shuffled(seed)
    return {
        "train": drawn[:train],
        "valid": drawn[train : train + valid],
        "test": read("fashion", "test").shuffled(0)[:test],
    }


def pretrained(classes: int = CLASSES, seed: int = 0) -> ConvNet:
    """The network trained on digits, in eval mode, with a new head drawn by the seed."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"there is no {WEIGHTS}: run python benchmarks/experiments/vision.py")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ConvNet(classes)
    weights = safetensors.torch.load_file(WEIGHTS)
    model.load_state_dict({**weights, **{f"head.{name}": value for name, value in model.head.state_dict().items()}})
    return model.eval()


def train(model: nn.Module, images: Images, epochs: int, learning_rate: float, seed: int = 0) -> None:
    """Train what requires a gradient with AdamW and OneCycleLR, on rows in an order drawn by the seed."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = epochs * (len(images) // BATCH)  # without an incomplete batch, whose norm statistics would be poor
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        order = images.shuffled(1000 * seed + epoch)
        for start in range(0, len(images) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch.pixels), batch.labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """The share of the images that `model`, in eval mode, classifies correctly."""
    right = 0
    for start in range(0, len(images), 500):
        some = images[start : start + 500]
        right += int((model(some.pixels).argmax(1) == some.labels).sum())
    return right / len(images)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, began = ConvNet(), time.perf_counter()
    digits, unseen = read("mnist", "train"), read("mnist", "test")
    train(model, digits, EPOCHS, RATE)
    count = sum(parameter.numel() for parameter in model.parameters())
    seconds = time.perf_counter() - began
    print(f"{count:,} parameters, {len(digits):,} digits, {EPOCHS} epochs, {seconds:.0f} seconds")
    print(f"accuracy on {len(unseen):,} other digits: {accuracy(model, unseen):.2%}")
    WEIGHTS.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    main()
