"""Adapters read, added and written without a model, and the dtype in which a model holds them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorakit
import models

IDS = torch.arange(2, 10)[None]


def saved(folder: Path, seed: int, rank: int = 2) -> Path:
    model = models.llama()
    lorakit.attach(model, ["q_proj", "v_proj"], rank=rank, alpha=4)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lorakit.parameters(model):
            parameter.normal_(std=0.1)
    lorakit.save(model, folder)
    return folder


def test_two_folders_are_added_without_a_model(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "one", 1), saved(tmp_path / "two", 2, rank=3)
    sum_of_both = lorakit.combine([lorakit.Adapter.load(one), lorakit.Adapter.load(two)], [0.5, -2.0])
    sum_of_both.save(tmp_path / "sum")
    base = models.llama()
    weights = {name: value.double() for name, value in base.state_dict().items()}
    for path, factor in ((one, 0.5), (two, -2.0)):
        for name, update in lorakit.Adapter.load(path).updates.items():
            weights[f"{name}.weight"] += factor * update.alpha / update.rank * update.B.double() @ update.A.double()
    exact = models.llama().double()
    exact.load_state_dict(weights)
    lorakit.load(base, tmp_path / "sum")
    torch.testing.assert_close(base(IDS).logits.double(), exact(IDS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("again", [False, True], ids=["plain", "adapted already"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16])
def test_load_takes_the_dtype_of_the_factors(dtype: torch.dtype | None, again: bool, tmp_path: Path) -> None:
    path, model = saved(tmp_path / "one", 1), models.llama()
    if again:
        lorakit.attach(model, ["q_proj", "v_proj"], rank=2)
    lorakit.load(model, path, dtype=dtype)
    assert {parameter.dtype for parameter in lorakit.parameters(model)} == {dtype or torch.float32}
    expected = lorakit.Adapter.load(path)
    for name, layer in lorakit.adapted_layers(model).items():
        assert torch.equal(layer.lora_A, expected.updates[name].A.to(dtype or torch.float32))


def test_a_loralib_file_is_read_and_written_as_a_folder(tmp_path: Path) -> None:
    model = models.llama()
    lorakit.load(model, saved(tmp_path / "one", 1))
    expected = model(IDS).logits.detach()
    lorakit.save(model, tmp_path / "one.pt")
    with pytest.raises(lorakit.LoraError, match="does not hold lora_alpha"):
        lorakit.Adapter.load(tmp_path / "one.pt")
    lorakit.Adapter.load(tmp_path / "one.pt", alpha=4).save(tmp_path / "again")
    other = models.llama()
    lorakit.load(other, tmp_path / "again")
    torch.testing.assert_close(other(IDS).logits, expected)
