"""`lora_linear`: the plain equation, and the gradient written out, against the weight W + s·B A in float64, numerical
differentiation and torch's own gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from measure import kept_bytes, operations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit
from kinds import drawn_mask
from lorakit.core.dropout import QuickDropout
from lorakit.core.linear import lora_linear, plain_linear
from storages import Made


def inputs(*shape: int, transposed: bool = False, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x (*shape, 5), weight (4, 5), bias (4), A (2, 5), B (4, 2), all of which require a gradient."""
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
    """bfloat16 products; every gradient has its parameter's dtype and is close to the exact one."""
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
    _, forward = torch.func.jvp(lambda row: net(row), (x[0],), (x[1],))  # type: ignore[misc]
    torch.testing.assert_close(forward, torch.autograd.functional.jvp(net, x[0], x[1])[1])


def test_compiled_whole() -> None:
    net, x = model(), torch.randn(3, 6, dtype=torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x))
    torch.testing.assert_close(gradients(net, compiled(x).sin().sum()), gradients(net, net(x).sin().sum()))


class OnlyLinear(Tensor):
    """A weight that supports only F.linear, like quantised weights."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
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


@pytest.mark.parametrize("with_gain", [False, True], ids=["LoRA", "DoRA"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("by", [lora_linear, plain_linear])
def test_both_ways_are_the_equation(by: Callable[..., Tensor], with_bias: bool, with_gain: bool) -> None:
    """The same arguments give the weight g ⊙ (W + s·B A), its bias, and its gradients; dropout acts on A's input."""
    x, weight, bias, A, B = inputs(2, 3)
    gain = torch.randn(4, dtype=torch.float64)
    dense = (weight + 0.7 * B @ A) * (gain[:, None] if with_gain else 1)
    exact = x @ dense.T + (bias if with_bias else 0)
    arguments = (x, weight, bias if with_bias else None, A, B, 0.7)
    y = by(*arguments, None, gain if with_gain else None)
    torch.testing.assert_close(y, exact)
    wanted = [x, weight, A, B]
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted)
    )
    torch.manual_seed(5)
    y = by(*arguments, nn.Dropout(0.4), gain if with_gain else None)
    torch.manual_seed(5)
    update = 0.7 * F.dropout(x, 0.4) @ A.T @ B.T
    exact = (x @ weight.T + update) * (gain if with_gain else 1) + (bias if with_bias else 0)
    torch.testing.assert_close(y, exact)


def test_the_shapes_that_the_source_shows() -> None:
    """Those of the worked example in linear.py, and its two numbers of operations."""
    x, weight, A, B = (torch.zeros(size) for size in ((4, 128, 576), (1536, 576), (16, 576), (1536, 16)))
    for by in (lora_linear, plain_linear):
        assert by(x, weight, None, A, B, 2.0, None, None).shape == (4, 128, 1536)
    dense = 2 * 512 * 576 * 1536
    thin = operations(lambda: lora_linear(x, weight, None, A, B, 2.0)) - dense
    assert (round(dense / 1e6), round(thin / 1e6)) == (906, 35)


def test_what_is_kept_for_the_backward_pass() -> None:
    """x once, and the thin product; not y and not a copy, for every dtype of the factors."""
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

    def call(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return lora_linear(x, weight, bias, A, B, 0.7, layer)

    y = checkpoint(call, *tensors, use_reentrant=reentrant)
    torch.rand(7)  # any draws between the two passes
    y.sin().sum().backward()
    got = [tensor.grad for tensor in tensors]
    expected = torch.autograd.grad(dropped_by_torch(*tensors).sin().sum(), tensors)
    torch.testing.assert_close(got, list(expected))


def seeded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` with the same random numbers at every call."""

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return function(*tensors)

    return call


@pytest.mark.parametrize("dropout", [None, QuickDropout(0.1)], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gain_value_and_gradients(with_bias: bool, dropout: nn.Dropout | None) -> None:
    """DoRA's y = g ⊙ (x Wᵀ + s · (M ⊙ x) Aᵀ Bᵀ) + b, against the equation and numerical differentiation."""
    torch.manual_seed(0)
    sizes = (
        [(3, 250, 1), (4, 1), (4,), (2, 1), (4, 2), (4,)] if dropout else [(3, 5), (4, 5), (4,), (2, 5), (4, 2), (4,)]
    )
    tensors = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]

    @seeded
    def mine(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
        return lora_linear(x, weight, bias if with_bias else None, A, B, 0.7, dropout, gain)

    @seeded
    def written_out(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, gain: Tensor) -> Tensor:
        kept = drawn_mask(0.1, x.shape) / 0.9 if dropout else 1
        return (x @ weight.T + 0.7 * (kept * x) @ A.T @ B.T) * gain + (bias if with_bias else 0 * bias)

    wanted = tensors if with_bias else tensors[:2] + tensors[3:]
    torch.testing.assert_close(mine(*tensors), written_out(*tensors))
    expected = torch.autograd.grad(written_out(*tensors).sin().sum(), wanted)
    torch.testing.assert_close(torch.autograd.grad(mine(*tensors).sin().sum(), wanted), expected)
    if not dropout:
        small = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes]
        assert torch.autograd.gradcheck(mine, small) and torch.autograd.gradgradcheck(mine, small)
    for index in (0, 3, 4, 5):  # a single gradient
        alone = [tensor.detach().requires_grad_(i == index) for i, tensor in enumerate(tensors)]
        mine(*alone).sin().sum().backward()
        torch.testing.assert_close(
            alone[index].grad, torch.autograd.grad(written_out(*tensors).sin().sum(), tensors[index])[0]
        )


def test_second_derivative_of_the_gain_alone() -> None:
    """B is frozen: S is not kept and must be computed again."""
    tensors = inputs(3)
    gain = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weight, bias, A, B = (tensor.detach() for tensor in tensors[1:])
    call = lambda x, gain: lora_linear(x, weight, bias, A, B, 0.7, None, gain)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, [tensors[0], gain])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_problem_38_no_tensor_of_a_step_with_dora_is_as_large_as_the_weight(dropout: float) -> None:
    """‖W + s B A‖² = ‖W‖² + 2 s ⟨W, B A⟩ + s² ‖B A‖² needs W Aᵀ (out, r) and A Aᵀ (r, r), and no B A (out, in)."""
    rows, ins, outs = 3, 640, 480
    model = nn.Sequential(nn.Linear(ins, outs, bias=False)).train()
    lorakit.attach(model, "0", rank=2, dora=True, dropout=dropout)
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(rows, ins, requires_grad=True)
    kept = kept_bytes(lambda: model(x), [*model.parameters(), *model.buffers()])
    assert kept <= 4 * (2 * rows * ins + rows * 2 + rows * outs + 2 * outs)
    with Made() as made:
        model(x).sum().backward()
    assert 0 < max(made.sizes) < layer.weight.nbytes / 10
    with Made() as dense:
        layer.adapted_matrix()
    assert max(dense.sizes) >= layer.weight.nbytes  # what the test looks for


def test_gain_keeps_the_input_and_one_output() -> None:
    """Beside x and S, only u is kept, for the gradient of g."""
    x, weight = torch.randn(50, 64, requires_grad=True), torch.randn(32, 64)
    A, B, gain = (torch.randn(size, requires_grad=True) for size in ((4, 64), (32, 4), (32,)))
    kept = kept_bytes(lambda: lora_linear(x, weight, torch.randn(32), A, B, 2.0, None, gain), (weight, A, B, gain))
    assert kept == 4 * (50 * 64 + 50 * 4 + 50 * 32)


@pytest.mark.parametrize("dropout", [None, nn.Dropout(0.5)], ids=["no dropout", "dropout"])
def test_operations_are_those_of_the_frozen_layer_and_six_thin_products(dropout: nn.Dropout | None) -> None:
    rows, ins, outs, rank = 30, 24, 16, 2
    sizes = [(rows, ins), (outs, ins), (rank, ins), (outs, rank)]
    x, weight, A, B = (torch.randn(size) for size in sizes)
    for tensor in (x, A, B):
        tensor.requires_grad_()
    dy = torch.randn(rows, outs)
    frozen = operations(lambda: F.linear(x, weight).backward(dy))
    assert frozen == 4 * rows * ins * outs
    counted = operations(lambda: lora_linear(x, weight, None, A, B, 1.0, dropout).backward(dy))
    assert counted - frozen == 6 * rows * rank * (ins + outs)


@pytest.mark.parametrize("transposed", [False, True])
def test_many_rows_are_multiplied_by_the_sum_of_the_weights(transposed: bool) -> None:
    """From some number of rows on, W + s·B A is formed because it is less work; the derivatives are the equation's."""
    tensors = inputs(40, transposed=transposed)
    expected = torch.autograd.grad(equation(*tensors).sin().sum(), tensors)
    y = fast(*tensors)
    torch.testing.assert_close(y, equation(*tensors))
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), tensors), expected)
    assert torch.autograd.gradcheck(fast, tensors) and torch.autograd.gradgradcheck(fast, tensors)
    assert kept_bytes(lambda: fast(*tensors), tensors[1:]) == 40 * 5 * 8
    dense, thin, forming = 2 * 40 * 4 * 5, 2 * 40 * 2 * (4 + 5), 2 * 2 * 4 * 5
    assert operations(lambda: fast(*tensors)) == dense + forming < dense + thin
    few = inputs(8)
    assert operations(lambda: fast(*few)) == 2 * 8 * (4 * 5 + 2 * (4 + 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32 factors", "bfloat16 factors"])
def test_in_bfloat16_the_sum_of_the_weights_is_never_rounded(dtype: torch.dtype) -> None:
    """An update of a thousandth of the weights is below bfloat16's precision, but must not be lost."""
    torch.manual_seed(0)
    x, weight = torch.randn(400, 16).bfloat16(), torch.ones(16, 16).bfloat16()
    x[:, 8:] = -x[:, :8]  # so that the weight's own output is zero
    A, B = torch.randn(2, 16).to(dtype), (1e-3 * torch.randn(16, 2)).to(dtype)
    exact = 0.7 * x.double() @ A.double().T @ B.double().T
    y = lora_linear(x, weight, None, A, B, 0.7).double()
    torch.testing.assert_close(y, exact, rtol=0, atol=0.02 * exact.abs().max().item())
    assert exact.abs().max() < 0.05


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_gradients(dtype: torch.dtype, rows: int) -> None:
    """With at most r rows, the unchanged factors are multiplied; the value is the equation's."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((rows, 32), (16, 32), (16,)))
    A, B = (torch.randn(size, dtype=torch.promote_types(dtype, torch.float32)) for size in ((3, 32), (16, 3)))
    exact = equation(*(tensor.double() for tensor in (x, weight, bias, A, B)))
    tolerance = 1e-12 if dtype == torch.float64 else 0.02
    with torch.no_grad():
        y = lora_linear(x, weight, bias, A, B, 0.7)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=tolerance * exact.abs().max().item())
        with torch.autocast("cpu", torch.bfloat16):
            y = lora_linear(x.float(), weight.float(), bias.float(), A.float(), B.float(), 0.7)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.02 * exact.abs().max().item())


def test_shared_inputs_are_kept_once() -> None:
    """q, k and v (and gate and up) read one tensor. A block keeps it once, with and without dropout."""
    layers = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q", "k", "v")})
    lorakit.attach(layers, list(layers), rank=2, dropout=0.05)
    x = torch.randn(4, 50, 64, requires_grad=True)
    kept = kept_bytes(lambda: [layer(x) for layer in layers.values()], layers.parameters())
    size = x.numel() * 4
    assert size < kept < size + 3 * (200 * 2 * 4 + 0.05 * 1.3 * x.numel())
