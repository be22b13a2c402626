"""`bake`: the adapter becomes a permanent part of the weights, and no weight is held twice."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import lorakit
import models


def trained(**settings: Any) -> nn.Module:
    model = models.llama()
    lorakit.attach(model, rank=2, **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lorakit.parameters(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"also_train": "lm_head"}, {"bias": "all"}], ids=str)
def test_a_baked_model_is_plain_and_is_what_merging_gives(settings: dict[str, Any]) -> None:
    baked, merged = trained(**settings), trained(**settings)
    lorakit.merge(merged, force=True)
    lorakit.detach(merged)
    lorakit.bake(baked, force=True)
    assert [type(module) for module in baked.modules()] == [type(module) for module in models.llama().modules()]
    assert baked.state_dict().keys() == models.llama().state_dict().keys()
    for name, value in merged.state_dict().items():
        assert torch.equal(baked.state_dict()[name], value), name
    assert not any("lorakit" in name for module in baked.modules() for name in vars(module))


def test_no_weight_is_there_twice() -> None:
    model = trained()
    layers = lorakit.adapted_layers(model)
    before = [weakref.ref(layer.weight) for layer in layers.values()]
    most = 0
    for layer in layers.values():  # what is in memory while the next one is merged
        bake = type(layer).bake

        def counted(own: nn.Module = layer, bake: object = bake) -> None:
            nonlocal most
            bake(own)  # type: ignore[operator]
            gc.collect()
            baked = sum("lora_A" in module._parameters and module.merged for module in layers.values())
            most = max(most, sum(weight() is not None for weight in before) + baked - len(before))

        layer.__dict__["bake"] = counted
    lorakit.bake(model, force=True)
    gc.collect()
    assert all(weight() is None for weight in before) and most == 0


def test_what_cannot_be_merged_is_told_before_anything_changes() -> None:
    model = models.llama()
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapted layer: call lorakit.attach"):
        lorakit.bake(model)
    model = trained()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with lorakit.disabled(model), pytest.raises(ValueError, match=r"the model is inside lorakit\.disabled"):
        lorakit.bake(model, force=True)
    assert lorakit.adapted_layers(model)
    for name, value in model.state_dict().items():
        assert torch.equal(before[name], value)
