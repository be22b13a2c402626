"""The mode of each module during `evaluating` and after it."""

import pytest
import torch
from torch import nn

import lorakit
from lorakit.core.evaluating import evaluating


def made() -> nn.Sequential:
    """A model in training whose first block is in eval mode, except for that block's dropout."""
    model = nn.Sequential(
        nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)), nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    )
    model[0].eval()
    model.get_submodule("0.1").train()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


def test_each_module_gets_its_own_mode_back() -> None:
    model = made()
    expected = {"": True, "0": False, "0.0": False, "0.1": True, "1": True, "1.0": True, "1.1": True}
    assert modes(model) == expected
    with evaluating(model):
        assert not any(modes(model).values())
    assert modes(model) == expected


def test_the_modes_come_back_after_an_error() -> None:
    model = made()
    expected = modes(model)
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        raise RuntimeError("inside")
    assert modes(model) == expected


def test_a_layer_that_merges_in_eval_mode_is_unmerged_again() -> None:
    layer = lorakit.Linear(3, 3, r=2)
    model = nn.Sequential(layer)
    with torch.no_grad():
        nn.init.ones_(layer.lora_B)
    states, weight = [layer.merged], layer.weight.detach().clone()
    with evaluating(model):
        states.append(layer.merged)
    states.append(layer.merged)
    assert states == [False, True, False] and torch.equal(layer.weight, weight)


def test_a_norm_with_frozen_statistics_keeps_the_mode_that_detach_gives_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).train()
    lorakit.attach(model, targets="0")
    with evaluating(model):
        assert not model[1].training
    lorakit.detach(model)
    assert model[1].training
