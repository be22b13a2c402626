"""What every hand-written gradient has to bear, whatever the layer: second derivatives, autocast, checkpoints,
torch.func, torch.compile, odd strides, one gradient alone; and what it keeps. Against torch's own layer with the weight
W + s·ΔW, which tests/reference writes out in float64.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import kept_bytes, operations
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorakit
from kinds import F64, LINEAR_AND_CONV, SCALE, adapted, every_kind, expected, factors, given, inputs_of
from reference import equation


def compare(kind: str, model: nn.Sequential, x: Tensor, loss: Tensor) -> None:
    wanted = inputs_of(model, x)
    exact = torch.autograd.grad(expected(kind, model, x).sin().sum(), wanted)
    if kind == "padded embedding":  # the reference knows nothing of counts and padding: see the next test
        return
    torch.testing.assert_close(torch.autograd.grad(loss, wanted), exact)


@every_kind
def test_values_and_gradients(kind: str) -> None:
    model, x = adapted(kind), given(kind)
    torch.testing.assert_close(model(x), expected(kind, model, x))
    compare(kind, model, x, model(x).sin().sum())


def test_padding_and_frequency_of_an_embedding() -> None:
    """torch's own embedding of A's columns has the same two options."""
    model = adapted("padded embedding")
    tokens = torch.tensor([[1, 1, 2], [1, 5, 2]])
    layer = model[0]
    dA, dB = torch.autograd.grad(model(tokens).sin().sum(), [layer.lora_A, layer.lora_B])
    columns = nn.functional.embedding(tokens, layer.lora_A.T, 2, scale_grad_by_freq=True)
    y = layer.weight[tokens] + SCALE * columns @ layer.lora_B.T
    torch.testing.assert_close((dA, dB), torch.autograd.grad(y.sin().sum(), [layer.lora_A, layer.lora_B]))
    assert dA[:, 2].eq(0).all() and dA[:, 1].ne(0).all()


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
        torch.rand(5)  # whatever is drawn in between
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
    torch.compiler.reset()  # the limit on recompilations is of the code, which all these models share
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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("attached", [True, False])
def test_autocast_does_not_round_an_update_away(attached: bool, groups: int) -> None:
    """It is far beneath bfloat16's steps at the weight: the sum of the two kernels would not show it."""
    layer: Any = lorakit.Conv2d(4, 4, 1, r=2, groups=groups, bias=False)
    if attached:
        model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=groups, bias=False))
        lorakit.attach(model, "0", rank=2)
        layer = model[0]
    nn.init.ones_(layer.weight)
    nn.init.normal_(layer.lora_A, std=0.01)
    nn.init.normal_(layer.lora_B, std=0.01)
    plane = torch.randn(2, 1, 20, 20)
    x = torch.cat((plane, -plane, plane, -plane), 1)  # which the weight alone sums to zero
    exact = layer._conv_forward(x, layer.scaling * layer.delta(), None)
    assert 0 < exact.abs().max() < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).float()
    torch.testing.assert_close(y, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


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
    """The gradients are those of the mask that was drawn: found out by an update that shows it."""
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


def test_problem_13_a_convolution_drops_by_the_mask_that_torch_draws() -> None:
    layer = lorakit.Conv2d(3, 4, 3, r=2, lora_alpha=4, lora_dropout=0.5, padding=1).double()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 3, 6, 6, dtype=F64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    update = equation.loralib_conv_weight(0 * layer.weight, layer.lora_A, layer.lora_B, 2.0)
    conv = nn.functional.conv2d
    torch.testing.assert_close(y, conv(x, layer.weight, layer.bias, padding=1) + conv(dropped, update, padding=1))


# --- what is kept, and how much is computed ------------------------------------------------------------------------


def test_kept_by_an_embedding_is_its_tokens() -> None:
    model = nn.Sequential(nn.Embedding(50, 64))
    lorakit.attach(model, "0", rank=4)
    tokens = torch.randint(0, 50, (3, 20))
    assert kept_bytes(lambda: model(tokens), model.parameters()) == 60 * 8


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_by_a_convolution_is_its_input_once(dtype: torch.dtype, dropout: float) -> None:
    """And S, of rank r, and the mask in at most a bit an element."""
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1)).to(dtype)
    lorakit.attach(model, "0", rank=2, dropout=dropout)
    x = torch.randn(1, 8, 6, 6, dtype=dtype, requires_grad=True)
    kept = kept_bytes(lambda: model(x), model.parameters())
    S = 2 * 6 * 6 * x.element_size()
    assert 0 <= kept - x.numel() * x.element_size() - S <= (x.numel() / 8 if dropout else 0)


def test_kept_by_a_convolution_over_many_positions_is_its_input() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    lorakit.attach(model, "0", rank=2)
    x = torch.randn(2, 8, 32, 32, requires_grad=True)
    assert kept_bytes(lambda: model(x), model.parameters()) == x.numel() * 4


def test_shared_inputs_are_kept_once() -> None:
    """q, k and v, and gate and up, read one tensor: a block keeps it once, with dropout as without."""
    layers = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("q", "k", "v")})
    lorakit.attach(layers, list(layers), rank=2, dropout=0.05)
    x = torch.randn(4, 50, 64, requires_grad=True)
    kept = kept_bytes(lambda: [layer(x) for layer in layers.values()], layers.parameters())
    size = x.numel() * 4
    assert size < kept < size + 3 * (200 * 2 * 4 + 0.05 * 1.3 * x.numel())


def test_operations_of_a_grouped_convolution_are_those_of_one_kernel() -> None:
    """In float32 the sum of the kernels is formed: thin already, and one convolution in the place of two."""
    plain = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    model = nn.Sequential(copy.deepcopy(plain))
    lorakit.attach(model, "0", rank=2)
    x = torch.randn(2, 16, 10, 10)
    forming = 2 * 16 * 2 * 9
    assert operations(lambda: model(x)) == operations(lambda: plain(x)) + forming


@pytest.mark.parametrize("size", [3, 32], ids=["few positions", "many positions"])
def test_operations_of_a_convolution(size: int) -> None:
    """r channels more and their kernel of ones, forward and for the gradients of x, A and B; or, formed, one kernel."""
    plain = nn.Conv2d(8, 8, 3, padding=1).requires_grad_(False)
    model = nn.Sequential(copy.deepcopy(plain))
    lorakit.attach(model, "0", rank=2)
    x = torch.randn(1, 8, size, size, requires_grad=True)
    positions = size * size
    thin, ones, forming = 2 * positions * 2 * 8 * 9, 2 * positions * 2 * 8, 2 * 8 * 2 * 72
    more = operations(lambda: model(x)) - operations(lambda: plain(x))
    assert more == (forming if size == 32 else thin + ones)
    more = operations(lambda: model(x).sum().backward()) - operations(lambda: plain(x).sum().backward())
    assert more == (2 * forming + 2 * thin + 2 * ones if size == 32 else 3 * thin + 3 * ones)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_of_an_embedding_drops_the_updates_of_tokens(dora: bool, compiled: bool) -> None:
    """Its input is a row with a single one: what drops it drops the token's update, and scales the others."""
    model = nn.Sequential(nn.Embedding(7, 5)).double()
    lorakit.attach(model, "0", rank=2, dora=dora, dropout=0.5)
    layer, tokens = model[0], torch.randint(0, 7, (40, 3))
    nn.init.normal_(layer.lora_A)
    base, gain = layer.weight[tokens], 1.0
    update = SCALE * (layer.lora_B @ layer.lora_A).T[tokens]
    if dora:
        gain = layer.lora_magnitude / (layer.weight.T + SCALE * layer.lora_B @ layer.lora_A).norm(dim=1).detach()
    torch.compiler.reset()
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    y = run(tokens)
    kept = ((y - gain * base) / (gain * update)).detach()
    torch.testing.assert_close(kept, kept[..., :1].expand_as(kept))  # a token as a whole
    mask = kept[..., :1].round()
    torch.testing.assert_close(kept[..., :1], mask)
    assert set(mask.unique().tolist()) == {0.0, 2.0} and 30 < (mask == 0).sum() < 90
    wanted = factors(model)
    expected_ = gain * (base + mask * update)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(expected_.sin().sum(), wanted)
    )
    torch.testing.assert_close(model.eval()(tokens), gain * (base + update))


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
