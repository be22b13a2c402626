"""Merging can be undone exactly, does not disturb tied weights, and does not change the state dict."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import lorakit

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layers() -> list[nn.Module]:
    made: list[Any] = [
        lorakit.Linear(6, 8, r=2),
        lorakit.Linear(6, 8, r=2, fan_in_fan_out=True),
        lorakit.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]),
        lorakit.Embedding(7, 5, r=2),
        lorakit.Conv1d(4, 6, 3, r=2),
        lorakit.Conv2d(4, 6, (1, 3), r=2, groups=2),
    ]
    for layer in made:
        for parameter in (layer.lora_A, layer.lora_B):
            nn.init.normal_(parameter)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(6))
def test_problem_06_a_hundred_rounds_restore_every_bit(index: int, dtype: torch.dtype) -> None:
    layer = layers()[index].to(dtype)
    weight, bits = layer.weight, layer.weight.detach().clone()
    for _ in range(100):
        layer.eval()
        assert layer.merged
        assert not torch.equal(layer.weight, bits)
        layer.train()
    assert layer.weight is weight
    assert torch.equal(layer.weight, bits)


def test_problem_06_loralib_drifts_in_the_same_test() -> None:
    """The installed loralib fails the test above, which is why that test exists."""
    loralib = pytest.importorskip("loralib")
    layer = loralib.Linear(64, 64, r=8).bfloat16()
    nn.init.normal_(layer.lora_B)
    bits = layer.weight.detach().clone()
    for _ in range(20):
        layer.eval()
        layer.train()
    assert not torch.equal(layer.weight, bits)


@pytest.mark.parametrize("save_merged", [False, True])
@pytest.mark.parametrize("load_merged", [False, True])
@pytest.mark.parametrize("index", range(6))
def test_problem_08_state_dicts_do_not_depend_on_the_mode(index: int, save_merged: bool, load_merged: bool) -> None:
    source, target = layers()[index], layers()[index]
    given = (
        torch.arange(5) if index == 3 else torch.randn(2, *((6,) if index < 3 else (4, 5) if index == 4 else (4, 5, 5)))
    )
    expected = source(given).detach()
    unmerged_state = copy.deepcopy(source.state_dict())
    source.train(not save_merged)
    state = source.state_dict()
    assert state.keys() == unmerged_state.keys()
    assert all(torch.equal(state[key], unmerged_state[key]) for key in state)
    target.train(not load_merged)
    target.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(target(given), expected)
        target.train()
        assert torch.equal(target(given), expected)


def test_problem_05_a_tied_weight_is_untied_while_merged() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 6)
            self.head = lorakit.Linear(6, 11, r=2, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(tokens))

    model, tokens = Tied(), torch.arange(11)
    nn.init.normal_(model.head.lora_B)
    expected = model(tokens).detach()
    table = model.embed.weight.detach().clone()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(tokens), expected)
    assert torch.equal(model.embed.weight, table)
    model.train()
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("index", range(6))
def test_problem_21_copies_pickles_moves_and_meta(index: int, merged: bool) -> None:
    layer = layers()[index].train(not merged)
    restored = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    restored.append(torch.load(buffer, weights_only=False))
    base = layer.state_dict()["weight"]
    for other in restored:
        assert other.merged == layer.merged
        assert torch.equal(other.weight, layer.weight)
        assert torch.equal(other.train().weight, base)
    # a dtype change converts the base weight; the merged one is computed from it and rounded once
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.merged == merged
    reference = copy.deepcopy(layer).train().to(torch.bfloat16).train(not merged)
    assert torch.equal(half.weight, reference.weight)
    meta = copy.deepcopy(layer).train().to("meta")
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty.weight, base)


def test_merged_weight_is_rounded_once() -> None:
    """bfloat16: the merged weight is the float64 sum rounded, not a sum of rounded terms."""
    layer = lorakit.Linear(64, 64, r=8, lora_alpha=3).bfloat16()
    nn.init.normal_(layer.lora_B, std=0.02)
    exact = layer.weight.double() + 3 / 8 * layer.lora_B.double() @ layer.lora_A.double()
    layer.eval()
    assert (layer.weight == exact.bfloat16()).float().mean() > 0.999


def test_merge_then_detach_leaves_a_plain_merged_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    lorakit.attach(model, rank=2)
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.lora_B)
    x = torch.randn(4, 6)
    expected = model(x).detach()
    lorakit.merge(model)
    lorakit.detach(model)
    assert type(model[0]) is nn.Linear
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    torch.testing.assert_close(model(x), expected)
    assert not any("_base_weight" in module.__dict__ for module in model.modules())
    assert not any(parameter.__dict__ for parameter in model.parameters())


def test_merging_a_plain_model_is_an_error() -> None:
    with pytest.raises(ValueError, match="Sequential has no adapted layer: call lorakit.attach"):
        lorakit.merge(nn.Sequential(nn.Linear(2, 2)))


def test_a_weight_frozen_while_merged_stays_frozen() -> None:
    model = nn.Sequential(lorakit.Linear(4, 3, r=2))
    model[0].weight.requires_grad = True
    model.eval()
    lorakit.mark_only_lora_as_trainable(model)
    model.train()
    assert not model[0].weight.requires_grad
