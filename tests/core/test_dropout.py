"""Dropout's masks: drawn evenly, kept in few bytes, the same in both passes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measure import kept_bytes
from torch import nn

import lorakit
from kinds import drawn_mask
from lorakit.core import dropout
from lorakit.core.linear import lora_linear


@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5), (2, 64), (0,)])
def test_a_mask_packed_and_unpacked_is_itself(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) < 0.5
    bits = dropout.pack(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-mask.numel() // 8)
    assert torch.equal(dropout.unpack(bits, mask.shape), mask)


@pytest.mark.parametrize("p", [0.002, 0.05, 0.125, 0.5, 0.9])
def test_quick_masks_drop_each_element_as_often_as_the_next(p: float) -> None:
    """This includes the first and the last element, and each is independent of its neighbours and of the next mask."""
    torch.manual_seed(0)
    rounds, size = 4000, max(40, round(64 / p)) if p <= 0.125 else 40
    flat = torch.stack([drawn_mask(p, (1, size)).flatten() for _ in range(rounds)])
    assert flat.unique().tolist() == [0, 1]
    spread = (p * (1 - p) / rounds) ** 0.5
    far = (flat.mean(0) - (1 - p)).abs() > 4 * spread
    assert far.sum() <= 5 + size * 3e-4 * 3  # of a binomial's mean, four deviations; skew makes more of small p
    assert abs(flat.mean() - (1 - p)) < 4 * spread / size**0.5
    centred = flat - (1 - p)
    for distance in (1, 2, 8, size - 1):
        products = centred[:, distance:] * centred[:, :-distance]
        assert abs(products.mean()) < 5 * p * (1 - p) / products.numel() ** 0.5


def test_a_mask_by_gaps_is_the_same_after_packing_in_every_width() -> None:
    for p, dtype in ((0.1, torch.uint8), (0.01, torch.int16), (0.0002, torch.int32)):
        x = torch.randn(8, round(20 / p))
        mask = dropout.Gaps.draw(x.numel(), p)
        assert mask.packed is not None and mask.packed.dtype == dtype
        ones = mask.masked(torch.ones_like(x))
        assert 0 < (ones == 0).sum() < x.numel()
        assert torch.equal(dropout.Gaps(mask.packed).masked(x), x * ones)
        assert torch.equal(dropout.Gaps(mask.packed).mask_(x.clone()), x * ones)


@pytest.mark.parametrize("p", [0.1, 0.3], ids=["by gaps", "by bits"])
def test_an_attached_layer_drops_by_quick_masks_and_its_gradients_are_those_of_the_same_mask(p: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 4)).double()
    lorakit.attach(model, rank=2, alpha=2, dropout=p)
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 10, 32, dtype=torch.float64, requires_grad=True)
    wanted = [x, layer.lora_A, layer.lora_B]
    torch.manual_seed(5)
    mask = drawn_mask(p, x.shape) / (1 - p)
    assert 0 < (mask == 0).sum() < mask.numel()
    expected = F.linear(x, layer.weight, layer.bias) + (mask * x) @ layer.lora_A.T @ layer.lora_B.T
    torch.manual_seed(5)
    y = model(x)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.sin().sum(), wanted), torch.autograd.grad(expected.sin().sum(), wanted)
    )
    assert torch.equal(model.eval()(x), model(x))


def test_dropout_keeps_the_input_once_and_few_bits_for_each_element() -> None:
    """Beside x and S: one bit for each element, or one byte for each dropped element (and a few more)."""
    x = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
    weight, A, B = torch.randn(32, 64).bfloat16(), torch.randn(4, 64), torch.randn(32, 4)
    constants = (weight, A.requires_grad_(), B.requires_grad_())
    bare = x.numel() * 2 + 2 * 50 * 4 * 2

    def kept(layer: nn.Dropout) -> int:
        return kept_bytes(lambda: lora_linear(x, weight, None, A, B, 2.0, layer), constants) - bare

    assert kept(nn.Dropout(0.1)) == kept(dropout.QuickDropout(0.2)) == x.numel() // 8
    dropped = 0.1 * x.numel()
    assert dropped <= kept(dropout.QuickDropout(0.1)) <= dropped + 6 * dropped**0.5 + 7


def test_the_sizes_that_the_source_shows() -> None:
    """Those of the worked example in dropout.py: a mask of 512 rows of 576, p = 0.05, x in float32."""
    x = torch.zeros(512, 576)
    gaps, bits = (dropout.draw_mask(x, kind(0.05), 16).packed for kind in (dropout.QuickDropout, nn.Dropout))
    assert gaps is not None and bits is not None
    assert (x.nbytes, bits.nbytes, gaps.nbytes) == (1_179_648, 36_864, 15_481)
    assert round(0.05 * x.numel()) == 14_746
