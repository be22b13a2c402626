"""Adapters made without training, so that their answers are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import lorakit


def classifier_adapter(base: Path, folder: Path, labels: tuple[str, ...], always: int = 0, value: float = 0.0) -> Path:
    """An adapter whose head gives every text the class number `always`; without labels it predicts `value`."""
    from lorakit.training.models import load_classifier

    model = load_classifier(str(base), labels=labels, dtype="float32").model
    lorakit.attach(model, ["query"], rank=2, also_train=["classifier"])
    with torch.no_grad():
        model.classifier.weight.mul_(0.01)
        model.classifier.bias.zero_()
        model.classifier.bias[always] = 5.0 if labels else value
    lorakit.save(model, folder)
    (folder / "labels.json").write_text(json.dumps(labels))
    return folder


def language_adapter(
    base: Path, folder: Path, scale: float = 0.03, *, seed: int = 1, rank: int = 2, dora: bool = False, **style: Any
) -> Path:
    """An adapter of a language model with factors that are not zero, and the style it was trained in."""
    from lorakit.training.models import load_causal_lm

    loaded = load_causal_lm(str(base), dtype="float32")
    torch.manual_seed(seed)  # a fixture of a module is made before the test's own seed
    lorakit.attach(loaded.model, rank=rank, alpha=2 * rank, dora=dora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    lorakit.save(loaded.model, folder)
    loaded.tokenizer.save_pretrained(folder)
    if style:
        (folder / "style.json").write_text(json.dumps(style))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def labelled_rows(path: Path, labels: list[Any]) -> Path:
    return write_rows(path, [{"text": f"turn the light on {i}", "label": label} for i, label in enumerate(labels)])
