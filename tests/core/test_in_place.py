"""An adapted layer allows everything after it that torch's layer allows, also writing in place on its output.

The gradients are those of torch's own layer with the weight W + s·ΔW, which tests/reference writes out in float64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
from kinds import F64, KINDS, adapted, every_kind, expected, given, inputs_of


def relu_module(y: Tensor) -> Tensor:
    return nn.ReLU(inplace=True)(y)


def add(y: Tensor) -> Tensor:
    y += torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)
    return y


def one_column(y: Tensor) -> Tensor:
    y[:, 0] = 0
    return y.square()


def masked(y: Tensor) -> Tensor:
    y[torch.arange(y.numel()).view(y.shape) % 3 == 0] = 0.5
    return y.sin()


def masked_fill(y: Tensor) -> Tensor:
    return y.masked_fill_(torch.arange(y.shape[-1]) % 2 == 0, 2.0).sin()


def part(y: Tensor) -> Tensor:
    y[..., 1:].mul_(3).tanh_()
    return y


def transposed(y: Tensor) -> Tensor:
    y.transpose(0, -1).mul_(2)
    return y.sin()


WRITES = [torch.relu_, relu_module, add, one_column, masked, masked_fill, part, transposed, torch.Tensor.zero_]
every_write = pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)


@every_kind
@every_write
def test_written_on(kind: str, write: Callable[[Tensor], Tensor]) -> None:
    model, x = adapted(kind), given(kind)
    y, exact = write(model(x)), write(expected(kind, model, x))
    torch.testing.assert_close(y, exact)
    if kind == "padded embedding":
        y.sum().backward()  # the reference ignores counts and padding
        return
    wanted = inputs_of(model, x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(exact.sum(), wanted))


@every_kind
@every_write
def test_written_on_after_dropout_and_under_autocast(kind: str, write: Callable[[Tensor], Tensor]) -> None:
    """Value and gradient of the output are the same as with a copy of it."""
    settings = {} if "embedding" in kind or kind == "fused, q and v" else {"dropout": 0.5}
    model, x = adapted(kind, torch.float32, **settings).train(), given(kind, torch.float32)
    for enabled in (False, True):
        gradients = []
        for copied in (False, True):
            torch.manual_seed(3)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = model(x)
                y = write(y.clone() if copied else y)
            gradients.append((y, *torch.autograd.grad(y.float().sum(), inputs_of(model, x))))
        torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


@every_kind
@every_write
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_written_on_where_no_gradient_is_recorded(kind: str, write: Callable[[Tensor], Tensor], context) -> None:
    model, x = adapted(kind), given(kind)
    with context():
        y = model(x)
        torch.testing.assert_close(write(y), write(expected(kind, model, x)))


@every_kind
def test_made_without_gradients_and_written_on_with_them(kind: str) -> None:
    """A frozen trunk runs under `no_grad`, and a head writes a trained value into its output."""
    model, x = adapted(kind), given(kind)
    with torch.no_grad():
        y = model(x)
    bias = torch.zeros(y.shape[-1], dtype=F64, requires_grad=True)
    y += bias
    y.sin().sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(bias.grad, model(x).cos().sum(tuple(range(y.dim() - 1))))


@every_kind
@every_write
def test_a_merged_layer_is_written_on(kind: str, write: Callable[[Tensor], Tensor]) -> None:
    """With gradients recorded: its output passes through the guard."""
    model, x = adapted(kind), given(kind)
    lorakit.merge(model)
    y = write(model(x))
    with torch.no_grad():
        torch.testing.assert_close(y, write(expected_of_merged(kind, model, x)))
    if write is not torch.Tensor.zero_:
        with pytest.raises(RuntimeError, match="backward through a merged LoRA layer"):
            y.sum().backward()


def expected_of_merged(kind: str, model: nn.Sequential, x: Tensor) -> Tensor:
    lorakit.unmerge(model)
    return expected(kind, model, x)


@every_write
@pytest.mark.parametrize("name", ["one row", "a vector", "few rows", "many rows", "half beside float32", "Factored"])
def test_every_way_to_compute_a_linear_layer(name: str, write: Callable[[Tensor], Tensor]) -> None:
    half = name == "half beside float32"
    model = nn.Sequential(nn.Linear(6, 5)).to(torch.bfloat16 if half else torch.float64)
    lorakit.attach(model, "0", rank=3)
    nn.init.normal_(model[0].lora_B)
    shape = {"one row": (1, 6), "a vector": (6,), "few rows": (2, 1, 6), "many rows": (60, 2, 6)}.get(name, (4, 5, 6))
    x = torch.randn(shape).to(model[0].weight.dtype).requires_grad_()
    if name == "a vector" and write in (one_column, transposed):
        pytest.skip("of one dimension")

    def run(copied: bool) -> tuple[Tensor, ...]:
        if name == "Factored":
            layer = model[0]
            weight = lorakit.core.factored.Factored(layer.weight, layer.scaling * layer.lora_B, layer.lora_A)
            y = nn.functional.linear(x, weight, layer.bias)
        else:
            y = model(x)
        y = write(y.clone() if copied else y)
        return y, *torch.autograd.grad(y.float().sum(), [x, model[0].lora_A, model[0].lora_B])

    torch.testing.assert_close(run(False), run(True), rtol=0, atol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
@every_write
def test_every_init(init: Any, dora: bool, write: Callable[[Tensor], Tensor]) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(3, 6, dtype=F64, requires_grad=True)
    lorakit.attach(model, "0", rank=2, init=init, dora=dora)
    nn.init.normal_(model[0].lora_B)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]
    y, copied = write(model(x)), write(model(x).clone())
    torch.testing.assert_close(torch.autograd.grad(y.sum(), trained), torch.autograd.grad(copied.sum(), trained))


@every_write
def test_attention_that_is_written_on(write: Callable[[Tensor], Tensor]) -> None:
    model = nn.MultiheadAttention(8, 2, batch_first=True, dtype=F64)
    holder = nn.ModuleDict({"attention": model})
    lorakit.attach(holder, "attention", rank=2)
    x = torch.randn(2, 3, 8, dtype=F64, requires_grad=True)
    trained = [x, *(p for p in holder.parameters() if p.requires_grad)]
    results = []
    for copied in (False, True):
        y = model(x, x, x)[0]
        results.append(torch.autograd.grad(write(y.clone() if copied else y).sum(), trained))
    torch.testing.assert_close(results[0], results[1])


def test_second_derivatives_after_a_write() -> None:
    for kind in KINDS:
        if kind in ("padded embedding", "DoRA"):
            continue  # see tests/core/test_gradients.py
        model, x = adapted(kind), given(kind)
        wanted = inputs_of(model, x)
        second = []
        for y in (model(x), expected(kind, model, x)):
            first = torch.autograd.grad(y.mul_(2).sin_().sum(), wanted, create_graph=True)
            second.append(torch.autograd.grad(sum((g.square().sum() for g in first), torch.zeros(())), wanted))
        torch.testing.assert_close(second[0], second[1])


def test_what_is_kept_is_checked_as_by_torch() -> None:
    """The input is kept for the backward pass: writing on it is an error, as with a trained torch layer."""
    model, x = adapted("linear"), given("linear")
    hidden = x * 1
    y = model(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_residual_network_with_relu_in_place_trains() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
            self.inner, self.outer = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.norm(self.conv(x))).mean((2, 3))
            hidden = self.relu(self.inner(y))
            out = self.outer(hidden)
            out += y
            return self.relu(out)

    model = Block()
    lorakit.attach(model, ["conv", "inner", "outer"], rank=2)
    x = torch.randn(3, 4, 5, 5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace`", "ignore:.*torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("shape", [(2, 6), (2, 3, 6)])
def test_a_trace_takes_other_sizes(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    lorakit.attach(model, rank=2)
    nn.init.normal_(model[0].lora_B)
    model.eval().requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(shape))
        x = torch.randn(5, *shape[1:])
        torch.testing.assert_close(traced(x), model(x))
