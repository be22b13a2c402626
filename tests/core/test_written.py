"""What is written on a merged weight stays, minus the update, as in loralib; the rest stays bit for bit."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import loralib
import pytest
import torch
from torch import Tensor, nn

import lorakit
from lorakit.core.fingerprint import tensor_fingerprint

LAYERS: dict[str, Callable] = {
    "Linear": lambda lib: lib.Linear(6, 8, r=2, lora_alpha=3),
    "fan_in_fan_out": lambda lib: lib.Linear(6, 8, r=2, fan_in_fan_out=True),
    "MergedLinear": lambda lib: lib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]),
    "Embedding": lambda lib: lib.Embedding(7, 5, r=2),
    "Conv2d": lambda lib: lib.Conv2d(4, 6, 3, r=2),
}


def made(name: str, library) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name](library)
    for factor in (layer.lora_A, layer.lora_B):
        nn.init.normal_(factor)
    return layer


def owner(layer: nn.Module) -> nn.Module:
    return getattr(layer, "conv", layer)  # loralib's convolution is a child


def assign(layer: nn.Module, value: Tensor) -> None:
    layer.weight = nn.Parameter(value.clone())


def assign_data(layer: nn.Module, value: Tensor) -> None:
    layer.weight.data = value.clone()


def copy_under_no_grad(layer: nn.Module, value: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(value)


def copy_data(layer: nn.Module, value: Tensor) -> None:
    layer.weight.data.copy_(value)


def optimizer_step(layer: nn.Module, value: Tensor) -> None:
    layer.weight.requires_grad = True
    layer.weight.grad = layer.weight.detach() - value
    torch.optim.SGD([layer.weight], lr=1.0).step()
    layer.weight.grad = None


def through_numpy(layer: nn.Module, value: Tensor) -> None:
    layer.weight.detach().numpy()[...] = value.numpy()


WRITES = [assign, assign_data, copy_under_no_grad, copy_data, optimizer_step, through_numpy]
every_write = pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
@every_write
def test_what_is_written_in_eval_is_there_in_train_as_in_loralib(name: str, write) -> None:
    ours, theirs = made(name, lorakit), made(name, loralib)
    value = torch.randn(ours.weight.shape)
    for layer in (ours, theirs):
        layer.eval()
        write(owner(layer), value)
    state = ours.state_dict()["weight"].clone()
    for layer in (ours, theirs):
        layer.train()
    torch.testing.assert_close(ours.weight, owner(theirs).weight)
    assert not ours.merged and torch.equal(ours.weight, state)
    with torch.no_grad():
        ours.eval()
        torch.testing.assert_close(ours.weight.detach(), value)


@every_layer
@every_write
def test_a_part_that_is_not_written_keeps_every_bit(name: str, write) -> None:
    layer = made(name, lorakit)
    weight, before = layer.weight, layer.weight.detach().clone()
    layer.eval()
    value = layer.weight.detach().clone()
    value[1] = 7.0
    update = value[1] - layer.weight.detach()[1] + before[1]  # 7 minus the update of that row
    write(layer, value)
    layer.train()
    exact = write is not optimizer_step  # it rounds values that it does not change
    close: dict[str, Any] = {"rtol": 0, "atol": 0} if exact else {}
    rest = [index for index in range(len(before)) if index != 1]
    torch.testing.assert_close(layer.weight[rest], before[rest], **close)
    torch.testing.assert_close(layer.weight[1].detach(), update)
    assert (layer.weight is weight) == (write is not assign)


@every_write
def test_of_attached_layers_parameters_and_experts(write) -> None:
    """Before and after unmerging, the model computes with the written weights."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = nn.Parameter(torch.randn(3, 5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.stack.mT)

    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "experts": Experts()})
    lorakit.attach(model, ["attention", "stack"], rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    lorakit.merge(model)
    holders = [
        (model["attention"], "in_proj_weight"),
        (model["attention"].out_proj, "weight"),
        (model["experts"], "stack"),
    ]
    for module, name in holders:
        module._parameters[name].data[0] = 3.0
    x, batch = torch.randn(2, 1, 4), torch.randn(3, 2, 4)
    with torch.no_grad():
        merged = model["attention"](x, x, x)[0], model["experts"](batch)
        lorakit.unmerge(model)
        torch.testing.assert_close((model["attention"](x, x, x)[0], model["experts"](batch)), merged)
    lorakit.detach(model)
    assert not model["experts"].stack[0].eq(3).any()


@pytest.mark.parametrize("rows", [slice(1, 3), slice(None)])
def test_with_dora_the_written_rows_take_their_norm_as_magnitude(rows: slice) -> None:
    model = nn.Sequential(nn.Linear(6, 5)).double()
    lorakit.attach(model, rank=2, dora=True)
    layer, x = model[0], torch.randn(4, 6, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    nn.init.uniform_(layer.lora_magnitude, 1, 2)
    before, magnitude = layer.weight.detach().clone(), layer.lora_magnitude.detach().clone()
    lorakit.merge(model)
    layer.weight.data[rows] = torch.randn(5, 6, dtype=torch.float64)[rows]
    with torch.no_grad():
        merged, state = model(x), copy.deepcopy(model.state_dict())
        lorakit.unmerge(model)
        torch.testing.assert_close(model(x), merged)
    kept = torch.ones(5, dtype=torch.bool)
    kept[rows] = False
    assert torch.equal(layer.weight[kept], before[kept]) and torch.equal(layer.lora_magnitude[kept], magnitude[kept])
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@every_write
def test_written_before_and_after_a_copy(copier, write) -> None:
    layer = made("Linear", lorakit).eval()
    value = torch.randn(8, 6)
    write(layer, value)
    delta = layer.scaling * layer.delta()
    for other in (copier(layer), copier(layer.train().eval())):
        torch.testing.assert_close(other.train().weight.detach(), (value - delta).detach())
    untouched = made("Linear", lorakit).eval()
    assert torch.equal(copier(untouched).train().weight, made("Linear", lorakit).weight)


def test_moved_saved_disabled_after_a_write() -> None:
    value = torch.randn(8, 6)
    for move in (lambda layer: layer.double().float(), lambda layer: layer.to("cpu"), lambda layer: layer.eval()):
        layer = made("Linear", lorakit).eval()
        delta = (layer.scaling * layer.delta()).detach()
        layer.weight.data.copy_(value)
        with lorakit.disabled(layer), torch.no_grad():
            torch.testing.assert_close(layer(torch.eye(6)), (value - delta).T + layer.bias)
        torch.testing.assert_close(move(layer).train().weight.detach(), value - delta)
    buffer = io.BytesIO()
    layer.eval()
    layer.weight.data.copy_(value)
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.load(buffer)["weight"], value - delta)


def test_a_weight_that_is_tied_anew_while_merged_is_no_write() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(9, 6), "head": nn.Linear(6, 9, bias=False)})
    model["head"].weight = model["embed"].weight
    lorakit.attach(model, ["embed", "head"], rank=2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    table = model.get_parameter("embed.weight")
    before, tokens = table.detach().clone(), torch.arange(9)
    expected = model["head"](model["embed"](tokens))
    for tie in ("embed", "head"):
        lorakit.merge(model)
        model["head" if tie == "embed" else "embed"].weight = model[tie].weight
        lorakit.unmerge(model)
        assert model["embed"].weight is table and model["head"].weight is table and torch.equal(table, before)
        assert torch.equal(model["head"](model["embed"](tokens)), expected)


def test_factors_that_change_while_merged_are_no_write() -> None:
    layer = made("Linear", lorakit)
    before = layer.weight.detach().clone()
    layer.eval()
    nn.init.normal_(layer.lora_B)
    assert torch.equal(layer.train().weight, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (7, 64), (33, 129), (128, 64), (3, 5, 7)])
def test_a_fingerprint_sees_each_element(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randn(shape).to(dtype)
    mark = tensor_fingerprint(tensor)
    assert mark == tensor_fingerprint(tensor.clone()) and mark == tensor_fingerprint(
        tensor.mT.contiguous().mT if len(shape) > 1 else tensor
    )
    for change in (lambda t: t.neg_(), lambda t: t.mul_(2), lambda t: t.zero_(), lambda t: t.copy_(t.flip(0))):
        other = tensor.clone()
        change(other)
        assert torch.equal(other, tensor) or mark != tensor_fingerprint(other)
    for index in range(0, tensor.numel(), 17):
        other = tensor.clone()
        other.view(-1)[index] += 1
        assert mark != tensor_fingerprint(other)


def test_what_has_no_bits_has_no_fingerprint() -> None:
    assert tensor_fingerprint(torch.empty(3, 3, device="meta")) is None
    assert tensor_fingerprint(torch.ones(3, dtype=torch.int8)) is None
    layer = lorakit.Linear(4, 3, r=2).to("meta").eval().train()
    assert not layer.merged
