"""Every layer against the adapted weight written out in float64: outputs and gradients, merged and not."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorakit
from reference import equation

F64 = torch.float64


def randomise(layer: nn.Module) -> None:
    """No factor at zero, so that every gradient is non-zero too."""
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * 0.3)


def check(
    layer: nn.Module, weight_of: Callable[[], Tensor], apply: Callable[[Tensor, Tensor], Tensor], x: Tensor
) -> None:
    """`layer(x)` and all its gradients equal those of `apply(x, weight_of())`, and merging does not change it."""
    trained = [p for name, p in layer.named_parameters() if "lora_" in name]
    leaf = x.clone().requires_grad_(x.is_floating_point())
    inputs = [*trained, *([leaf] if leaf.requires_grad else [])]
    expected = apply(leaf, weight_of())
    actual = layer(leaf)
    probe = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected)
    for ours, reference in zip(
        torch.autograd.grad((actual * probe).sum(), inputs),
        torch.autograd.grad((expected * probe).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, reference)
    with torch.no_grad():
        lorakit.merge(layer)
        torch.testing.assert_close(layer(x), expected.detach())
        lorakit.unmerge(layer)
        torch.testing.assert_close(layer(x), expected.detach())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_attached_linear(rslora: bool, dora: bool, bias: bool, shape: tuple[int, ...]) -> None:
    layer = nn.Sequential(nn.Linear(5, 7, bias=bias, dtype=F64))
    lorakit.attach(layer, "0", rank=3, alpha=5, rslora=rslora, dora=dora)
    linear = layer[0]
    randomise(layer)
    scale = 5 / 3**0.5 if rslora else 5 / 3
    magnitude = linear.lora_magnitude if dora else None
    check(
        layer,
        lambda: equation.linear_weight(linear.weight, linear.lora_A, linear.lora_B, scale, magnitude),
        lambda x, w: F.linear(x, w, linear.bias),
        torch.randn(*shape, dtype=F64),
    )


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_constructed_linear(fan_in_fan_out: bool) -> None:
    layer = lorakit.Linear(5, 7, r=3, lora_alpha=2, fan_in_fan_out=fan_in_fan_out, dtype=F64)
    randomise(layer)
    base = layer.weight.T if fan_in_fan_out else layer.weight
    assert layer.weight.shape == ((5, 7) if fan_in_fan_out else (7, 5))
    check(
        layer,
        lambda: equation.linear_weight(base, layer.lora_A, layer.lora_B, 2 / 3),
        lambda x, w: F.linear(x, w, layer.bias),
        torch.randn(4, 5, dtype=F64),
    )


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("enabled", [[True, False, True], [False, True, False], [True, True, True], [True]])
def test_merged_linear(enabled: list[bool], fan_in_fan_out: bool) -> None:
    layer = lorakit.MergedLinear(
        5, 12, r=2, lora_alpha=3, enable_lora=enabled, fan_in_fan_out=fan_in_fan_out, dtype=F64
    )
    randomise(layer)
    base = layer.weight.T if fan_in_fan_out else layer.weight
    check(
        layer,
        lambda: equation.merged_linear_weight(
            base, layer.lora_A, layer.lora_B, 3 / 2, [(12 // len(enabled), 2 * flag) for flag in enabled]
        ),
        lambda x, w: F.linear(x, w, layer.bias),
        torch.randn(2, 3, 5, dtype=F64),
    )


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        (dict(r=2, splits=[6, 2, 4]), [(6, 2), (2, 2), (4, 2)]),
        (dict(r=2, splits=[6, 2, 4], enable_lora=[True, False, True]), [(6, 2), (2, 0), (4, 2)]),
        (dict(r=[3, 0, 1], splits=[6, 2, 4]), [(6, 3), (2, 0), (4, 1)]),
        (dict(r=[3, 2, 1], splits=[6, 2, 4], enable_lora=[False, True, True]), [(6, 0), (2, 2), (4, 1)]),
        (dict(r=[1, 2, 3]), [(4, 1), (4, 2), (4, 3)]),
    ],
    ids=["sizes", "flags", "ranks", "flags and ranks", "equal"],
)
def test_problem_19_blocks_of_any_size_with_a_flag_and_rank_each(arguments, blocks, fan_in_fan_out: bool) -> None:
    layer = lorakit.MergedLinear(5, 12, lora_alpha=3, fan_in_fan_out=fan_in_fan_out, dtype=F64, **arguments)
    randomise(layer)
    base = layer.weight.T if fan_in_fan_out else layer.weight
    assert (layer.splits, layer.enable_lora) == ([size for size, _ in blocks], [rank > 0 for _, rank in blocks])
    highest = max(rank for _, rank in blocks)
    assert layer.r == highest
    check(
        layer,
        lambda: equation.merged_linear_weight(base, layer.lora_A, layer.lora_B, 3 / highest, blocks),
        lambda x, w: F.linear(x, w, layer.bias),
        torch.randn(2, 3, 5, dtype=F64),
    )


def test_problem_19_merged_linear_without_an_enabled_block_is_a_plain_linear() -> None:
    layer = lorakit.MergedLinear(5, 12, r=2, enable_lora=[False, False])
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not any("lora_" in name for name, _ in layer.named_parameters())
    with pytest.raises(ValueError, match="out_features=12, r=2, .*: the output is not a multiple of 5 equal blocks"):
        lorakit.MergedLinear(5, 12, r=2, enable_lora=[True] * 5)
    for arguments in (
        dict(r=2, splits=[6, 5]),
        dict(r=2, splits=[13, -1]),
        dict(r=[2, -1]),
        dict(r=[2, 2], splits=[4, 4, 4]),
        dict(r=2, splits=[6, 6], enable_lora=[True]),
    ):
        with pytest.raises(ValueError, match="expected a rank and a flag for each of the . blocks, and sizes that sum"):
            lorakit.MergedLinear(5, 12, **arguments)


class OwnConv(lorakit.ConvLoRA):
    """Written like loralib's own subclasses: it inherits only from ConvLoRA."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(nn.Conv2d, *args, **kwargs)
        self.note = "kept"


def test_third_party_convolutions_inherit_conv_lora_alone() -> None:
    own, ours = OwnConv(3, 8, 3, r=2, padding=1), lorakit.Conv2d(3, 8, 3, r=2, padding=1)
    randomise(own)
    ours.load_state_dict(own.state_dict())
    image = torch.randn(1, 3, 5, 5)
    expected = ours(image)
    assert isinstance(own, OwnConv) and isinstance(own, nn.Conv2d) and type(OwnConv(3, 8, 3)) is type(own)
    for layer in (own, copy.deepcopy(own), pickle.loads(pickle.dumps(own))):
        assert torch.equal(layer(image), expected)
        assert type(layer) is type(own) and layer.note == "kept"
    direct = lorakit.ConvLoRA(nn.Conv1d, 3, 8, 3, r=2)
    assert direct(torch.randn(2, 3, 9)).shape == (2, 8, 7)


def test_deleting_the_factors_leaves_the_plain_layer_or_the_merged_one() -> None:
    x = torch.randn(3, 5)
    layer = lorakit.Linear(5, 7, r=2)
    randomise(layer)
    merged = copy.deepcopy(layer)
    expected = layer(x).detach()
    del layer.lora_A, layer.lora_B
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    merged.eval()
    del merged.lora_A, merged.lora_B
    for state in (merged.state_dict(), merged.train().state_dict()):
        plain = nn.Linear(5, 7)
        plain.load_state_dict(state)
        torch.testing.assert_close(plain(x), expected)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_embedding(attached: bool, scale_grad_by_freq: bool) -> None:
    if attached:
        model = nn.Sequential(nn.Embedding(9, 5, padding_idx=2, scale_grad_by_freq=scale_grad_by_freq, dtype=F64))
        lorakit.attach(model, "0", rank=3, alpha=2)
        layer = model[0]
    else:
        layer = lorakit.Embedding(
            9, 5, r=3, lora_alpha=2, padding_idx=2, scale_grad_by_freq=scale_grad_by_freq, dtype=F64
        )
    randomise(layer)
    tokens = torch.randint(0, 9, (4, 6))
    check(
        layer,
        # Rows of the whole adapted table. torch scales the gradient by its own rule for such a table.
        lambda: layer.weight,
        lambda t, w: (
            F.embedding(t, w)
            + 2 / 3 * F.embedding(t, layer.lora_A.T, 2, scale_grad_by_freq=scale_grad_by_freq) @ layer.lora_B.T
        ),
        tokens,
    )
    with torch.no_grad():
        table = equation.embedding_weight(layer.weight, layer.lora_A, layer.lora_B, 2 / 3)
        torch.testing.assert_close(layer(tokens), table[tokens])


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_problem_20_padding_row_keeps_no_update_whatever_the_init(init: Any) -> None:
    model = nn.Sequential(nn.Embedding(9, 5, padding_idx=2))
    nn.init.normal_(model[0].weight)
    lorakit.attach(model, "0", rank=3, init=init)
    layer = model[0]
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(9)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer(torch.tensor(2)), layer.weight[2])
    assert not torch.equal(layer(torch.tensor(3)), layer.weight[3])


def test_problem_20_padding_row_keeps_no_update_and_max_norm_is_refused() -> None:
    layer = lorakit.Embedding(9, 5, r=3, padding_idx=2, merge_weights=False)
    padding = layer.weight[2].clone()
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        layer(torch.arange(9)).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer(torch.tensor(2)), padding)
    assert not torch.equal(layer(torch.tensor(3)), layer.weight[3])
    layer.merge()
    assert torch.equal(layer.weight[2], padding)
    with pytest.raises(ValueError, match="max_norm=1.0 cannot be combined"):
        lorakit.Embedding(9, 5, r=3, max_norm=1.0)
    with pytest.raises(ValueError, match="max_norm=1.0 renormalises"):
        lorakit.attach(nn.Sequential(nn.Embedding(9, 5, max_norm=1.0)), "0")


CONV_SETTINGS = [
    dict(stride=s, dilation=d, padding=p, padding_mode=m, groups=g)
    for s in (1, 2)
    for d in (1, 2)
    for p in (0, 1, "same", "valid")
    for m in ("zeros", "reflect", "replicate", "circular")
    for g in (1, 2, 4)
    if not (p == "same" and s == 2)
]


@pytest.mark.parametrize("settings", CONV_SETTINGS, ids=lambda s: "-".join(str(v) for v in s.values()))
def test_problem_10_convolutions_honour_every_setting(settings: dict) -> None:
    plain = nn.Conv2d(4, 8, (3, 1), dtype=F64, **settings)
    x = torch.randn(2, 4, 9, 8, dtype=F64)
    attached = nn.Sequential(nn.Conv2d(4, 8, (3, 1), dtype=F64, **settings))
    attached[0].load_state_dict(plain.state_dict())
    lorakit.attach(attached, "0", rank=3, alpha=2)
    randomise(attached)
    layer = attached[0]
    check(
        attached,
        lambda: equation.conv_weight(layer.weight, layer.lora_A, layer.lora_B, 2 / 3),
        lambda x, w: plain._conv_forward(x, w, layer.bias),
        x,
    )
    constructed = lorakit.Conv2d(4, 8, (3, 1), r=3, lora_alpha=2, dtype=F64, **settings)
    randomise(constructed)
    check(
        constructed,
        lambda: equation.loralib_conv_weight(constructed.weight, constructed.lora_A, constructed.lora_B, 2 / 3),
        lambda x, w: plain._conv_forward(x, w, constructed.bias),
        x,
    )


def convolution_in_peft(conv: nn.Conv2d, **settings) -> nn.Module:
    """PEFT's layer for a convolution, which also reports its update."""
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["0"], init_lora_weights=False, **settings)
    return peft.get_peft_model(nn.Sequential(conv), config).base_model.model[0]


@pytest.mark.parametrize("settings", [dict(padding=1, padding_mode="circular"), dict(padding="same", dilation=2)])
def test_problem_10_peft_fails_the_same_test(settings: dict) -> None:
    layer = convolution_in_peft(nn.Conv2d(4, 8, 3, **settings), r=2)
    x, conv = torch.randn(2, 4, 9, 9), layer.base_layer
    expected = conv._conv_forward(x, conv.weight + layer.get_delta_weight("default"), conv.bias)
    try:
        differs = not torch.allclose(layer(x), expected, atol=1e-3)
    except RuntimeError:  # the update has another size than the output
        differs = True
    assert differs


@pytest.mark.parametrize(("rank", "groups", "outputs"), [(1, 4, 8), (3, 2, 6), (5, 6, 6), (2, 6, 12)])
def test_problem_12_grouped_convolutions_of_any_rank_depthwise_too_and_merged(
    rank: int, groups: int, outputs: int
) -> None:
    inputs = 12 if groups == 4 else 6
    plain = nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, dtype=F64)
    model = nn.Sequential(copy.deepcopy(plain))
    lorakit.attach(model, "0", rank=rank, alpha=rank)
    randomise(model)
    layer, x = model[0], torch.randn(2, inputs, 5, 5, dtype=F64)
    weight = equation.conv_weight(layer.weight, layer.lora_A, layer.lora_B, 1.0)
    expected = plain._conv_forward(x, weight, plain.bias)
    torch.testing.assert_close(model(x), expected)
    lorakit.merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
    lorakit.detach(model)
    torch.testing.assert_close(layer.weight, weight)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_problem_12_peft_fails_the_same_test() -> None:
    with pytest.raises(ValueError, match="divisible"):
        convolution_in_peft(nn.Conv2d(6, 6, 3, groups=2), r=3)
    with pytest.raises(NotImplementedError):
        convolution_in_peft(nn.Conv2d(6, 6, 3, groups=2), r=4).merge()


@pytest.mark.parametrize(
    ("torch_class", "own_class", "kernel"),
    [(nn.Conv1d, lorakit.Conv1d, 3), (nn.Conv2d, lorakit.Conv2d, 3), (nn.Conv3d, lorakit.Conv3d, (1, 3, 2))],
)
@pytest.mark.parametrize("dora", [False, True])
def test_problem_11_convolutions_of_all_dimensions(torch_class, own_class, kernel, dora: bool) -> None:
    plain = torch_class(4, 6, kernel, padding=1, groups=2, dtype=F64)
    x = torch.randn(2, 4, *(5,) * (plain.weight.dim() - 2), dtype=F64)
    model = nn.Sequential(torch_class(4, 6, kernel, padding=1, groups=2, dtype=F64))
    lorakit.attach(model, "0", rank=3, alpha=2, dora=dora)
    randomise(model)
    layer = model[0]
    assert type(layer) is own_class

    def weight() -> Tensor:
        total = equation.conv_weight(layer.weight, layer.lora_A, layer.lora_B, 2 / 3)
        if not dora:
            return total
        norms = total.detach().flatten(1).norm(dim=1)
        return total * (layer.lora_magnitude / norms).view(-1, *(1,) * (total.dim() - 1))

    check(model, weight, lambda x, w: plain._conv_forward(x, w, layer.bias), x)
    constructed = own_class(4, 6, kernel, r=2, padding=1, groups=2, dtype=F64)
    randomise(constructed)
    check(
        constructed,
        lambda: equation.loralib_conv_weight(constructed.weight, constructed.lora_A, constructed.lora_B, 1 / 2),
        lambda x, w: plain._conv_forward(x, w, constructed.bias),
        x,
    )


def test_problem_13_dropout_acts_on_the_update_alone() -> None:
    for model in (
        nn.Sequential(nn.Linear(50, 7, dtype=F64)),
        nn.Sequential(nn.Conv1d(50, 7, 1, dtype=F64)),
    ):
        x = torch.ones(1, 50, dtype=F64) if isinstance(model[0], nn.Linear) else torch.ones(1, 50, 1, dtype=F64)
        base = model(x)
        lorakit.attach(model, "0", rank=50, alpha=50, dropout=0.25)
        with torch.no_grad():
            model[0].lora_A.copy_(torch.eye(50, dtype=F64).view_as(model[0].lora_A))
            model[0].lora_B.fill_(1.0)
        # With A = 1 and B = 1 the update is the sum of the inputs kept, each worth 1/(1 − p).
        kept = (model(x) - base) * 0.75
        torch.testing.assert_close(kept, kept.round())
        assert 20 < kept.flatten()[0] < 49
        model.eval()
        torch.testing.assert_close(model(x) - base, torch.full_like(base, 50.0))


@pytest.mark.parametrize("init", ["kaiming", "gaussian", "pissa", "olora"])
def test_every_init_starts_at_the_base_model(init: Any) -> None:
    model = nn.Sequential(nn.Linear(24, 16, dtype=F64), nn.ReLU(), nn.Linear(16, 8, dtype=F64))
    x = torch.randn(3, 24, dtype=F64)
    before, weight = model(x), model[0].weight.clone()
    lorakit.attach(model, rank=4, init=init)
    torch.testing.assert_close(model(x), before)
    assert torch.equal(model[0].weight, weight)
    model(x).square().sum().backward()
    assert model[0].lora_B.grad.abs().sum() > 0


def test_pissa_takes_the_leading_singular_directions() -> None:
    model = nn.Sequential(nn.Linear(24, 16, bias=False, dtype=F64))
    U, S, V = torch.linalg.svd(model[0].weight.detach())
    lorakit.attach(model, rank=4, alpha=6, init="pissa")
    layer = model[0]
    best = U[:, :4] @ torch.diag(S[:4]) @ V[:4]
    torch.testing.assert_close((6 / 4 * layer.lora_B @ layer.lora_A).detach(), best)
    # A = B·√S of the pair: both factors carry the same norm (eq. 2-3 of the paper).
    torch.testing.assert_close(layer.lora_A.detach().norm(dim=1), layer.lora_B.detach().norm(dim=0))


def test_olora_factors_are_those_of_the_qr_decomposition() -> None:
    model = nn.Sequential(nn.Linear(24, 16, bias=False, dtype=F64))
    lorakit.attach(model, rank=4, init="olora")
    layer = model[0]
    torch.testing.assert_close((layer.lora_B.T @ layer.lora_B).detach(), torch.eye(4, dtype=F64))
    # The first columns of W are spanned by the first columns of Q alone.
    torch.testing.assert_close((layer.lora_B @ layer.lora_A)[:, :4].detach(), layer.weight[:, :4].detach())


def test_gaussian_has_the_spread_it_says() -> None:
    model = nn.Sequential(nn.Linear(4000, 4))
    lorakit.attach(model, rank=8, init="gaussian")
    assert model[0].lora_A.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert model[0].lora_B.abs().sum() == 0


def test_problem_17_train_and_eval_return_self_and_merged_gradients_are_an_error() -> None:
    layer = lorakit.Linear(5, 7, r=2)
    assert layer.train() is layer
    assert layer.eval() is layer
    with pytest.raises(RuntimeError, match="backward through a merged LoRA layer"):
        layer(torch.randn(3, 5)).sum().backward()
    layer.train()
    layer(torch.randn(3, 5)).sum().backward()
    assert layer.lora_B.grad is not None


def test_problem_22_only_the_thin_tensors_are_cast() -> None:
    """A bfloat16 base with float32 factors: activations stay bfloat16, gradients are float32."""
    model = nn.Sequential(nn.Linear(16, 8)).bfloat16()
    lorakit.attach(model, rank=2)
    layer = model[0]
    assert (layer.weight.dtype, layer.lora_A.dtype) == (torch.bfloat16, torch.float32)
    x = torch.randn(64, 16, dtype=torch.bfloat16)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in kept)
    y.float().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
    lorakit.detach(model)
    lorakit.attach(model, rank=2, dtype=torch.bfloat16)
    assert model[0].lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d])
def test_autocast(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(16, 8) if kind is nn.Linear else kind(16, 8, 1))
    lorakit.attach(model, "0", rank=2)
    randomise(model)
    x = torch.randn(3, 16) if kind is nn.Linear else torch.randn(3, 16, 4)
    full = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)


def test_r_0_is_the_plain_layer() -> None:
    x, tokens = torch.randn(3, 5), torch.arange(4)
    torch.testing.assert_close(lorakit.Linear(5, 7)(x).shape, torch.Size([3, 7]))
    for layer, given in (
        (lorakit.Linear(5, 7), x),
        (lorakit.MergedLinear(5, 6), x),
        (lorakit.Embedding(4, 3), tokens),
        (lorakit.Conv1d(5, 2, 1), x[..., None]),
    ):
        names = {name for name, _ in layer.named_parameters()}
        assert names <= {"weight", "bias"}
        assert all(p.requires_grad for p in layer.parameters())
        before = layer(given)
        assert torch.equal(layer.eval()(given), before)
