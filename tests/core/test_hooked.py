"""Models that accelerate spread over devices, and models without data: adapted, or refused with what to do."""

from typing import Any

import accelerate
import pytest
import torch
from accelerate import hooks
from torch import nn

import lorakit
import models
from quantised import BASES


def spread(model: nn.Module) -> nn.Module:
    """As a device_map over several devices leaves it: a hook on every module."""
    hooks.attach_execution_device_hook(model, torch.device("cpu"))
    hooks.add_hook_to_module(model, hooks.AlignDevicesHook(io_same_device=True), append=True)
    return model


def filled(model: Any) -> Any:
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in lorakit.parameters(model):
            parameter.copy_(torch.randn_like(parameter) / 4)
    return model


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_a_model_over_several_devices_is_adapted(make: Any) -> None:
    ids = torch.arange(6)[None]
    plain, hooked = make(), spread(make())
    before = plain(ids).logits
    for model in (plain, hooked):
        lorakit.attach(model, rank=2)
        filled(model)
    expected = plain(ids).logits
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(hooked(ids).logits, expected)
    hooked(ids).logits.sum().backward()
    assert lorakit.diagnose(hooked).silent == ()
    lorakit.merge(hooked)
    with torch.no_grad():
        torch.testing.assert_close(hooked(ids).logits, expected, atol=1e-5, rtol=1e-5)
    lorakit.unmerge(hooked)
    lorakit.detach(hooked)
    assert torch.equal(hooked(ids).logits, before)
    hooks.remove_hook_from_module(hooked, recurse=True)
    assert torch.equal(hooked(ids).logits, before)


def test_an_update_beside_a_quantised_layer_with_a_hook() -> None:
    base, x = BASES[0], torch.randn(3, 64)
    hooked, plain = spread(base.model()), base.model()
    for model in (hooked, plain):
        lorakit.attach(model, rank=2)
        filled(model)
    assert torch.equal(hooked(x), plain(x))


def test_an_error_leaves_the_hooks_as_they_were() -> None:
    model = spread(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    x = torch.randn(2, 4)
    expected = model(x)
    with pytest.raises(lorakit.LoraError, match="no_such"):
        lorakit.attach(model, "0", also_train="no_such")
    with pytest.raises(lorakit.LoraError, match="rank"):
        lorakit.attach(model, "0", rank=0)
    assert torch.equal(model(x), expected)


def test_offloaded_layers_are_refused_with_what_to_do() -> None:
    model = accelerate.cpu_offload(models.llama(), execution_device=torch.device("cpu"))
    with pytest.raises(lorakit.LoraError, match="the device_map offloads its weight.*Load the model with a device_map"):
        lorakit.attach(model, "q_proj")
    assert not lorakit.adapted_layers(model)


@pytest.mark.parametrize("settings", [{}, {"dropout": 0.5}, {"dora": True}, {"rslora": True}], ids=str)
def test_a_model_without_data_is_adapted_and_runs(settings: Any) -> None:
    """Shapes and counts of a model that is too large for this machine."""
    with torch.device("meta"):
        model = models.llama().train()
        report = lorakit.attach(model, rank=2, **settings)
        logits = model(torch.zeros(2, 5, dtype=torch.long)).logits
    assert logits.shape == (2, 5, 64) and logits.is_meta
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in lorakit.parameters(model))
    real = models.llama()
    assert report.trainable == lorakit.attach(real, rank=2, **settings).trainable
