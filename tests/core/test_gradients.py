"""What every hand-written gradient must support, for every layer: second derivatives, autocast, checkpoints,
torch.func, torch.compile, odd strides, a single gradient; and what it keeps. Reference: torch's layer with the weight
W + s·ΔW, which tests/reference writes out in float64.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit
from kinds import F64, LINEAR_AND_CONV, adapted, every_kind, expected, factors, given, inputs_of


def compare(kind: str, model: nn.Sequential, x: Tensor, loss: Tensor) -> None:
    wanted = inputs_of(model, x)
    exact = torch.autograd.grad(expected(kind, model, x).sin().sum(), wanted)
    if kind == "padded embedding":  # the reference ignores counts and padding: see the next test
        return
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), exact)


@every_kind
def test_values_and_gradients(kind: str) -> None:
    model, x = adapted(kind), given(kind)
    torch.testing.assert_close(model(x), expected(kind, model, x))
    compare(kind, model, x, model(x).sin().sum())


def as_function(model: nn.Sequential, x: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The model as a function of its trained parameters and of x."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    tensors = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def call(*values: Tensor) -> Tensor:
        rest = values[len(names) :] or (x,)
        return torch.func.functional_call(model, dict(zip(names, values, strict=False)), rest)

    return call, [*tensors, *([x] if x.requires_grad else [])]


@every_kind
def test_first_and_second_derivative_by_differences(kind: str) -> None:
    if kind in ("DoRA", "padded embedding"):
        pytest.skip("by design no derivative of the value: DoRA's norm is a constant, a padding column has no gradient")
    call, tensors = as_function(adapted(kind), given(kind))
    fast = "conv" in kind  # many numbers
    assert torch.autograd.gradcheck(call, tensors, fast_mode=fast)
    assert torch.autograd.gradgradcheck(call, tensors, fast_mode=fast)


@every_kind
def test_one_gradient_alone(kind: str) -> None:
    model, x = adapted(kind), given(kind)
    gradients = torch.autograd.grad(model(x).sin().sum(), inputs_of(model, x))
    whole = {id(tensor): gradient for tensor, gradient in zip(inputs_of(model, x), gradients, strict=True)}
    for tensor in inputs_of(model, x):
        for other in inputs_of(model, x):
            other.requires_grad_(False)
        tensor.requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(model(x).sin().sum(), tensor)[0], whole[id(tensor)])
        for other in (*model.parameters(), x):
            if id(other) in whole:
                other.requires_grad_()


@every_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    settings: dict[str, Any] = {} if "embedding" in kind or kind == "fused, q and v" else {"dropout": 0.4}
    model, x = adapted(kind, **settings).train(), given(kind)

    def forward(x: Tensor, _: Tensor) -> Tensor:
        return model(x)

    def run(call: Callable[[], Tensor]) -> list[Tensor | None]:
        torch.manual_seed(3)
        loss = call().sin().sum()
        torch.rand(5)  # any draws in between
        for tensor in inputs_of(model, x):
            tensor.grad = None
        loss.backward()
        return [tensor.grad for tensor in inputs_of(model, x)]

    anchor = torch.zeros((), requires_grad=True)  # reentrant checkpoints need an input with a gradient
    plain = run(lambda: forward(x, anchor))
    torch.testing.assert_close(run(lambda: checkpoint(forward, x, anchor, use_reentrant=reentrant)), plain)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain)


@every_kind
def test_used_twice(kind: str) -> None:
    model, x = adapted(kind), given(kind)
    if kind == "padded embedding":
        pytest.skip("its reference is another one")
    loss = model(x).square().sum() + model(x.flip(0)).sin().sum()
    exact = expected(kind, model, x).square().sum() + expected(kind, model, x.flip(0)).sin().sum()
    wanted = inputs_of(model, x)
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), torch.autograd.grad(exact, wanted))


@every_kind
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # forward mode, inside torch
def test_torch_func(kind: str) -> None:
    """Each row's own gradient by vmap(grad)."""
    if kind == "padded embedding":
        pytest.skip("torch counts the frequency over the whole batch")
    model, x = adapted(kind), given(kind).detach()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (row[None],)).sin().sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, x)
    for i, row in enumerate(x):
        alone = torch.autograd.grad(model(row[None]).sin().sum(), factors(model))
        torch.testing.assert_close([gradient[i] for gradient in each.values()], list(alone))


@every_kind
def test_problem_27_compiled_whole(kind: str) -> None:
    model, x = adapted(kind), given(kind)
    torch.compiler.reset()  # all these models share the code and its limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    wanted = inputs_of(model, x)
    torch.testing.assert_close(
        torch.autograd.grad(compiled(x).sin().sum(), wanted), torch.autograd.grad(model(x).sin().sum(), wanted)
    )


@every_kind
def test_autocast(kind: str) -> None:
    """Products in bfloat16, gradients in the parameters' own dtype and near the exact ones."""
    model, x = adapted(kind, torch.float32), given(kind, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == (torch.float32 if "embedding" in kind else torch.bfloat16)
    wanted = inputs_of(model, x)
    gradients = torch.autograd.grad(y.float().square().sum(), wanted)
    plain = torch.autograd.grad(model(x).square().sum(), wanted)
    for gradient, exact in zip(gradients, plain, strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, exact, rtol=0.05, atol=0.03 * exact.abs().max().item())


@pytest.mark.parametrize("kind", LINEAR_AND_CONV)
def test_inputs_of_odd_strides(kind: str) -> None:
    """Transposed rows, images with the channels last in memory, every second element of a larger tensor."""
    model, x = adapted(kind), given(kind)
    turned = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    wide = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=F64)
    wide[..., ::2] = x.detach()
    for other in (turned, wide[..., ::2].requires_grad_()):
        assert not other.is_contiguous()
        torch.testing.assert_close(model(other), model(x))
        exact = torch.autograd.grad(model(x).sin().sum(), inputs_of(model, x))
        torch.testing.assert_close(torch.autograd.grad(model(other).sin().sum(), inputs_of(model, other)), exact)


@pytest.mark.parametrize("kind", [kind for kind in LINEAR_AND_CONV if kind != "fused, q and v"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_dropout(kind: str, channels_last: bool) -> None:
    """The gradients use the mask that was drawn; an update that shows the mask proves it."""
    model, x = adapted(kind, dropout=0.5).train(), given(kind)
    if channels_last:
        x = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_()
    layer = model[0]

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return model(x)

    # A finite difference in x's direction sees the mask of both passes.
    loss = run(x).sin().sum()
    gradients = torch.autograd.grad(loss, inputs_of(model, x))
    for tensor, gradient in zip(inputs_of(model, x), gradients, strict=True):
        if tensor is getattr(layer, "lora_magnitude", None) or ("DoRA" in kind and tensor is not x):
            continue  # the norm is a constant for the gradient
        direction, step = torch.randn_like(tensor), 1e-6
        with torch.no_grad():
            ahead = run(x + step * direction) if tensor is x else None
            if ahead is None:
                tensor.add_(step * direction)
                ahead = run(x)
                tensor.sub_(2 * step * direction)
                behind = run(x)
                tensor.add_(step * direction)
            else:
                behind = run(x - step * direction)
        difference = (ahead.sin().sum() - behind.sin().sum()) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-6)
    assert not torch.equal(run(x), model.eval()(x))


def test_dropout_acts_on_all_that_was_chosen_together() -> None:
    model = nn.Sequential(
        nn.Embedding(7, 6), nn.Linear(6, 5), nn.Flatten(), nn.Unflatten(1, (5, 3)), nn.Conv1d(5, 4, 3)
    )
    lorakit.attach(model, ["all-linear", "0", "4"], rank=2, dropout=0.5)
    for layer in (model[0], model[1], model[4]):
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
    x = torch.randint(0, 7, (30, 3))
    for others in ((1, 4), (0, 4), (0, 1)):  # each alone makes two passes differ
        for index in (0, 1, 4):
            model[index].train(index not in others)
        assert not torch.equal(model(x), model(x))
