"""loralib's .pt files: written as loralib writes them; reading asks for what they lack."""

import copy
import os
from pathlib import Path

import loralib
import pytest
import torch
from torch import nn

import lorakit
from models import train_a_little


def build(library) -> nn.ModuleDict:
    """The same program with either library."""
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "embed": library.Embedding(11, 6, r=2, lora_alpha=4),
            "qkv": library.MergedLinear(6, 12, r=2, lora_alpha=4, enable_lora=[True, False, True]),
            "out": library.Linear(6, 5, r=2, lora_alpha=4),
            "conv": library.Conv2d(3, 4, 3, r=2, lora_alpha=4),
        }
    )


def forward(model: nn.ModuleDict) -> list[torch.Tensor]:
    x = model["embed"](torch.arange(5))
    image = torch.arange(75.0).view(1, 3, 5, 5) / 75
    return [x, model["qkv"](x), model["out"](x), model["conv"](image)]


def randomise(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("bias"):
            nn.init.normal_(parameter)


def test_files_of_loralib_are_read_and_ours_are_read_by_loralib(tmp_path: Path) -> None:
    theirs = build(loralib)
    randomise(theirs)
    torch.save(loralib.lora_state_dict(theirs), tmp_path / "theirs.pt")
    ours = build(lorakit)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    randomise(ours)
    lorakit.load(ours, tmp_path / "theirs.pt", alpha=4)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if k.endswith("bias")}, strict=False)
    for mine, expected in zip(forward(ours), forward(theirs), strict=True):
        torch.testing.assert_close(mine, expected)

    lorakit.save(ours, tmp_path / "ours.pt")
    state = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert set(state) == set(loralib.lora_state_dict(theirs))
    fresh = build(loralib)
    _, unexpected = fresh.load_state_dict(state, strict=False)
    assert unexpected == []
    assert all(torch.equal(fresh.state_dict()[key], theirs.state_dict()[key]) for key in state)


def test_a_plain_model_takes_a_loralib_file(tmp_path: Path) -> None:
    source = nn.Sequential(loralib.Linear(4, 3, r=2, lora_alpha=6))
    randomise(source)
    torch.save({"model_state_dict": loralib.lora_state_dict(source, bias="lora_only")}, tmp_path / "a.pt")
    plain = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        plain[0].weight.copy_(source[0].weight)
    adapter = lorakit.load(plain, tmp_path / "a.pt", alpha=6)
    assert adapter.bias == "lora_only"
    x = torch.randn(2, 4)
    torch.testing.assert_close(plain(x), source(x))


def test_what_a_loralib_file_lacks_or_may_not_hold(tmp_path: Path) -> None:
    model = nn.Sequential(lorakit.Linear(4, 3, r=2))
    path = tmp_path / "a.pt"
    lorakit.save(model, path)
    with pytest.raises(ValueError, match="does not hold lora_alpha"):
        lorakit.load(model, path)
    with pytest.raises(FileNotFoundError, match="b.pt: no such file"):
        lorakit.load(model, tmp_path / "b.pt", alpha=1)

    torch.save({"0.lora_A": torch.ones(2, 4)}, path)
    with pytest.raises(ValueError, match=r"0.lora_A has no 0.lora_B"):
        lorakit.load(model, path, alpha=1)
    torch.save(nn.Linear(4, 3).state_dict(), path)
    with pytest.raises(ValueError, match=r"expected <module>.lora_A(.|\n)*  weight"):
        lorakit.load(model, path, alpha=1)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="expected a dictionary of tensors, found list"):
        lorakit.load(model, path, alpha=1)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("should-not-exist",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"0.lora_A": RunsCode()}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="is not read: it is no file of plain tensors"):
        lorakit.load(nn.Sequential(nn.Linear(4, 3)), tmp_path / "bad.pt", alpha=1)
    assert not (tmp_path / "should-not-exist").exists()


def test_what_loralib_has_no_layer_for_is_not_written(tmp_path: Path) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3))
    lorakit.attach(conv, "0")
    with pytest.raises(ValueError, match="0 is a factored convolution"):
        lorakit.save(conv, tmp_path / "a.pt")
    dora = nn.Sequential(nn.Linear(3, 4))
    lorakit.attach(dora, "0", dora=True)
    with pytest.raises(ValueError, match="0 is a DoRA layer"):
        lorakit.save(dora, tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("settings", [dict(rslora=True), dict(init="pissa"), dict(init="olora", rslora=True)])
def test_read_with_the_alpha_of_training_it_is_the_same_function(settings: dict, tmp_path: Path) -> None:
    """The file holds only factors, and loralib's scale is α/r. Any other scale is multiplied into B."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 6))
    model = copy.deepcopy(plain)
    lorakit.attach(model, rank=4, alpha=6, **settings)
    train_a_little(model)
    lorakit.save(model, tmp_path / "a.pt")
    lorakit.load(plain, tmp_path / "a.pt", alpha=6)
    x = torch.randn(3, 8)
    torch.testing.assert_close(plain(x), model(x), atol=1e-5, rtol=1e-5)


def test_several_alphas_are_not_written_into_a_file_that_is_read_with_one(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    lorakit.attach(model, alpha_pattern={"0": 3})
    with pytest.raises(ValueError, match="read with one alpha, and these layers have 3, 32"):
        lorakit.save(model, tmp_path / "a.pt")
