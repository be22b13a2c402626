"""`lora_conv`: the plain equation, and the gradient written out. What all kinds of layer share is in
test_gradients.py.
"""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import kept_bytes, operations
from torch import nn

import lorakit
from kinds import F64
from lorakit.core.conv import Geometry, lora_conv, plain_conv
from reference import equation


@pytest.mark.parametrize("by", [lora_conv, plain_conv])
@pytest.mark.parametrize("size", [4, 12], ids=["few positions", "many positions"])
def test_both_ways_are_the_equation(by, size: int) -> None:
    """The same arguments give torch's convolution with the kernel W + s·ΔW, and its gradients; dropout acts on A's
    input.
    """
    torch.manual_seed(0)
    sizes = ((2, 3, size, size), (4, 3, 3, 3), (4,), (2, 3, 3, 3), (4, 2, 1, 1))
    x, weight, bias, A, B = (torch.randn(shape, dtype=F64, requires_grad=True) for shape in sizes)
    geometry = Geometry((2, 2), (1, 1), (1, 1))
    update = 0.7 * torch.einsum("or,rikl->oikl", B[:, :, 0, 0], A)
    y = by(x, weight, bias, A, B, 0.7, geometry, None)
    exact = F.conv2d(x, weight + update, bias, stride=2, padding=1)
    torch.testing.assert_close(y, exact)
    wanted = [x, weight, bias, A, B]
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(exact.sin().sum(), wanted)
    )
    torch.manual_seed(5)
    y = by(x, weight, bias, A, B, 0.7, geometry, nn.Dropout(0.4))
    torch.manual_seed(5)
    exact = F.conv2d(F.dropout(x, 0.4), update, None, stride=2, padding=1)
    torch.testing.assert_close(y, exact + F.conv2d(x, weight, bias, stride=2, padding=1))


def test_the_shapes_that_the_source_shows() -> None:
    """Those of the worked example in conv.py."""
    sizes = ((8, 64, 28, 28), (64, 64, 3, 3), (16, 64, 3, 3), (64, 16, 1, 1))
    x, weight, A, B = (torch.zeros(size, device="meta") for size in sizes)
    geometry = Geometry((1, 1), (1, 1), (1, 1))
    assert geometry.convolution(x, A).shape == (8, 16, 28, 28)
    assert plain_conv(x, weight, None, A, B, 2.0, geometry, None).shape == (8, 64, 28, 28)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("attached", [True, False])
def test_autocast_does_not_round_an_update_away(attached: bool, groups: int) -> None:
    """The update is far below bfloat16's precision at the weight: a rounded sum of the kernels would lose it."""
    layer: Any = lorakit.Conv2d(4, 4, 1, r=2, groups=groups, bias=False)
    if attached:
        model = nn.Sequential(nn.Conv2d(4, 4, 1, groups=groups, bias=False))
        lorakit.attach(model, "0", rank=2, alpha=2)
        layer = model[0]
    nn.init.ones_(layer.weight)
    nn.init.normal_(layer.lora_A, std=0.01)
    nn.init.normal_(layer.lora_B, std=0.01)
    plane = torch.randn(2, 1, 20, 20)
    x = torch.cat((plane, -plane, plane, -plane), 1)  # so that the weight's own output is zero
    exact = layer._conv_forward(x, layer.scaling * layer.delta(), None)
    assert 0 < exact.abs().max() < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x).float()
    torch.testing.assert_close(y, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


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


@pytest.mark.parametrize("dropout", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_by_a_convolution_is_its_input_once(dtype: torch.dtype, dropout: float) -> None:
    """Also S, of rank r, and the mask with at most one bit for each element."""
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


def test_operations_of_a_grouped_convolution_are_those_of_one_kernel() -> None:
    """In float32 the sum of the kernels is formed, so one convolution replaces two."""
    plain = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    model = nn.Sequential(copy.deepcopy(plain))
    lorakit.attach(model, "0", rank=2)
    x = torch.randn(2, 16, 10, 10)
    forming = 2 * 16 * 2 * 9
    assert operations(lambda: model(x)) == operations(lambda: plain(x)) + forming


@pytest.mark.parametrize("size", [3, 32], ids=["few positions", "many positions"])
def test_operations_of_a_convolution(size: int) -> None:
    """Extra: r channels and a 1 × 1 kernel, forward and for the gradients of x, A and B; or forming one kernel."""
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
