"""The hand-written gradient of `lora_linear`, against numerical differentiation and against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import kept_bytes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit
from lorakit.core import masks
from lorakit.core.functional import lora_linear


def inputs(*shape: int, transposed: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (*shape, 5), weight (4, 5), bias (4), A (2, 5), B (4, 2), all of which want a gradient."""
    torch.manual_seed(0)
    weight = torch.randn(5, 4, dtype=dtype).T if transposed else torch.randn(4, 5, dtype=dtype)
    tensors = [torch.randn(*shape, 5, dtype=dtype), weight, torch.randn(4, dtype=dtype)]
    tensors += [torch.randn(2, 5, dtype=dtype), torch.randn(4, 2, dtype=dtype)]
    return [tensor.requires_grad_() for tensor in tensors]


def equation(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return x @ (weight + 0.7 * B @ A).T + bias


def fast(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return lora_linear(x, weight, bias, A, B, 0.7)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3), (0,)])
def test_value_and_gradients(shape: tuple[int, ...], transposed: bool) -> None:
    tensors = inputs(*shape, transposed=transposed)
    torch.testing.assert_close(fast(*tensors), equation(*tensors))
    dy = torch.randn(*shape, 4, dtype=torch.float64)
    expected = torch.autograd.grad(equation(*tensors), tensors, dy)
    torch.testing.assert_close(torch.autograd.grad(fast(*tensors), tensors, dy), expected)
    if shape != (0,):
        assert torch.autograd.gradcheck(fast, tensors)


def test_second_derivative() -> None:
    assert torch.autograd.gradgradcheck(fast, inputs(3))


@pytest.mark.parametrize("wanted", ["x", "A", "B", "bias", "weight"])
def test_gradient_of_one_input_alone(wanted: str) -> None:
    tensors = dict(zip(("x", "weight", "bias", "A", "B"), inputs(3), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == wanted)
    (expected,) = torch.autograd.grad(equation(**tensors).sin().sum(), tensors[wanted])
    fast(**tensors).sin().sum().backward()
    torch.testing.assert_close(tensors[wanted].grad, expected)
    assert all(tensor.grad is None for name, tensor in tensors.items() if name != wanted)


def test_rows_that_do_not_lie_side_by_side() -> None:
    x, *rest = inputs(3, 2)
    torch.testing.assert_close(fast(x.transpose(0, 1), *rest), equation(x.transpose(0, 1), *rest))
    torch.testing.assert_close(
        torch.autograd.grad(fast(x[:, 0], *rest).sum(), x), torch.autograd.grad(equation(x[:, 0], *rest).sum(), x)
    )
    # The gradient of an expanded sum has strides of zero.
    torch.testing.assert_close(
        torch.autograd.grad(fast(x, *rest).sum(), rest), torch.autograd.grad(equation(x, *rest).sum(), rest)
    )


@pytest.mark.parametrize("inside", [False, True], ids=["backward outside autocast", "backward inside autocast"])
def test_under_autocast(inside: bool) -> None:
    """bfloat16 products; every gradient in its parameter's own dtype, and near to the exact one."""
    tensors = inputs(64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = fast(*tensors)
    assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=inside):
        gradients = torch.autograd.grad(y.float().square().sum(), tensors)
    expected = torch.autograd.grad(equation(*tensors).square().sum(), tensors)
    for gradient, exact in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_float32_gradient_inside_autocast_stays_float32() -> None:
    tensors = inputs(64, dtype=torch.float32)
    y = fast(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(y, tensors, torch.ones_like(y))
    torch.testing.assert_close(gradients, torch.autograd.grad(equation(*tensors).sum(), tensors))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)).double()
    lorakit.attach(model, ["0", "2"], rank=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    net, x = model(), torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(net, net(x).sin().sum())
    checkpoint(net, x, use_reentrant=reentrant).sin().sum().backward()
    torch.testing.assert_close([p.grad for p in net.parameters() if p.requires_grad], expected)


def test_module_used_twice_in_one_forward() -> None:
    net, x = model(), torch.randn(3, 6, dtype=torch.float64)
    layer = net[0]
    W = layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    twice = F.linear(x, W, layer.bias).square().sum() + F.linear(2 * x, W, layer.bias).sin().sum()
    parameters = [layer.lora_A, layer.lora_B]
    mine = layer(x).square().sum() + layer(2 * x).sin().sum()
    torch.testing.assert_close(torch.autograd.grad(mine, parameters), torch.autograd.grad(twice, parameters))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode, inside torch
def test_torch_func() -> None:
    """Per-sample gradients by vmap(grad), and a forward-mode derivative."""
    net, x = model(), torch.randn(3, 6, dtype=torch.float64)
    trained = {name: p.detach() for name, p in net.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (row,)).sin().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for i, row in enumerate(x):
        for (name, gradient), expected in zip(per_sample.items(), gradients(net, net(row).sin().sum()), strict=True):
            torch.testing.assert_close(gradient[i], expected, msg=name)
    _, forward = torch.func.jvp(lambda row: net(row), (x[0],), (x[1],))
    torch.testing.assert_close(forward, torch.autograd.functional.jvp(net, x[0], x[1])[1])


def test_compiled_whole() -> None:
    net, x = model(), torch.randn(3, 6, dtype=torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(gradients(net, compiled(x).sin().sum()), gradients(net, net(x).sin().sum()))


class OnlyLinear(Tensor):
    """A weight that knows F.linear and nothing else, as quantised weights do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is not F.linear:
            raise NotImplementedError(function)
        with torch._C.DisableTorchFunctionSubclass():
            return F.linear(*args, **(kwargs or {}))


def test_weight_of_another_class_is_multiplied_by_its_own_linear() -> None:
    x, weight, bias, A, B = inputs(3)
    wrapped = weight.detach().as_subclass(OnlyLinear)
    wanted = [x, A, B]
    mine = torch.autograd.grad(lora_linear(x, wrapped, bias, A, B, 0.7).sin().sum(), wanted)
    torch.testing.assert_close(mine, torch.autograd.grad(equation(x, weight, bias, A, B).sin().sum(), wanted))


def test_what_is_kept_for_the_backward_pass() -> None:
    """x once, and the thin product; not y, not a copy, whatever the dtype of the factors."""
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    kept = kept_bytes(lambda: lora_linear(x, weight, None, A, B, 2.0), (weight, A, B))
    assert kept == 2 * 50 * 64 * 2 + 2 * 50 * 4 * 2


def dropped(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    torch.manual_seed(5)
    return lora_linear(x, weight, bias, A, B, 0.7, nn.Dropout(0.4))


def dropped_by_torch(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    torch.manual_seed(5)
    return x @ weight.T + 0.7 * F.dropout(x, 0.4) @ A.T @ B.T + bias


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
def test_dropout_value_and_gradients(shape: tuple[int, ...], transposed: bool) -> None:
    tensors = inputs(*shape, transposed=transposed)
    expected = dropped_by_torch(*tensors)
    torch.testing.assert_close(dropped(*tensors), expected)
    dy = torch.randn(*shape, 4, dtype=torch.float64)
    expected_gradients = torch.autograd.grad(expected, tensors, dy)
    torch.testing.assert_close(torch.autograd.grad(dropped(*tensors), tensors, dy), expected_gradients)
    if shape != (0,):
        assert torch.autograd.gradcheck(dropped, tensors)
        assert torch.autograd.gradgradcheck(dropped, tensors)


def test_dropout_of_rows_that_do_not_lie_side_by_side() -> None:
    x, *rest = inputs(3, 2)
    turned = x.transpose(0, 1)
    torch.testing.assert_close(dropped(turned, *rest), dropped_by_torch(turned, *rest))


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_under_gradient_checkpointing(reentrant: bool) -> None:
    tensors = inputs(3)
    torch.manual_seed(5)
    layer = nn.Dropout(0.4)

    def call(*given: Tensor) -> Tensor:
        return lora_linear(*given, 0.7, layer)

    y = checkpoint(call, *tensors, use_reentrant=reentrant)
    torch.rand(7)  # whatever is drawn between the two passes
    y.sin().sum().backward()
    got = [tensor.grad for tensor in tensors]
    expected = torch.autograd.grad(dropped_by_torch(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(got, list(expected))


def test_dropout_keeps_the_input_once_and_a_bit_for_each_element() -> None:
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, A, B = torch.randn(32, 64).bfloat16(), torch.randn(4, 64).requires_grad_(), torch.randn(32, 4)
    kept = kept_bytes(lambda: lora_linear(x, weight, None, A, B, 2.0, nn.Dropout(0.1)), (weight, A, B))
    assert kept == 2 * 50 * 64 * 2 + 2 * 50 * 64 // 8 + 2 * 50 * 4 * 2


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2, 64), (0,)])
def test_a_mask_packed_and_unpacked_is_itself(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    bits = masks.pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-mask.numel() // 8)
    assert torch.equal(masks.unpack(bits, mask.shape), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_quick_masks_drop_each_element_as_often_as_the_next(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, rounds = torch.empty(3, 17, dtype=dtype), 4000
    drawn = torch.stack([masks.draw_mask(x, masks.QuickDropout(p)) for _ in range(rounds)]).double()
    assert drawn.unique().tolist() == [0, 1]
    spread = (p * (1 - p) / rounds) ** 0.5
    assert ((drawn.mean(0) - (1 - p)).abs() < 5 * spread).all()
    flat = drawn.flatten(1)
    correlation = torch.corrcoef(flat.T) - torch.eye(flat.shape[1])
    assert correlation.abs().max() < 6 / rounds**0.5


def test_an_attached_layer_drops_by_quick_masks_and_its_gradients_are_those_of_the_same_mask() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    lorakit.attach(model, rank=2, alpha=2, dropout=0.3)
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.lora_A, layer.lora_B]
    torch.manual_seed(5)
    mask = masks.draw_mask(x, layer.lora_dropout) / 0.7
    assert 0 < (mask == 0).sum() < mask.numel()
    expected = F.linear(x, layer.weight, layer.bias) + (mask * x) @ layer.lora_A.T @ layer.lora_B.T
    torch.manual_seed(5)
    y = model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(expected.sin().sum(), wanted)
    )
    assert torch.equal(model.eval()(x), model(x))
