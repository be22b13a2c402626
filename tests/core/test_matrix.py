"""The matrix W + s·B A: the examples of the source, and the formed matrices compared with float64."""

import pytest
import torch

from lorakit.core.matrix import add_product, block_diagonal, dense_update, forming_pays, forms, row_norm, summed


def test_the_blocks_that_the_source_shows() -> None:
    """q has rank 2, k none, v rank 1; v's second column of B is not read."""
    B = torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 0], [10, 0], [11, 0], [12, 0]])
    q, v = [[1, 2, 0], [3, 4, 0], [5, 6, 0], [7, 8, 0]], [[0, 0, 9], [0, 0, 10], [0, 0, 11], [0, 0, 12]]
    blocks = ((4, 2), (4, 0), (4, 1))
    assert block_diagonal(B, blocks).tolist() == [*q, *[[0, 0, 0]] * 4, *v]


def test_the_numbers_of_an_update_that_the_source_shows() -> None:
    A, B = torch.zeros(16, 576), torch.zeros(1536, 16)
    assert (dense_update(A, B).numel(), A.numel() + B.numel()) == (884_736, 33_792)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_the_sum_is_that_of_float64(dtype: torch.dtype) -> None:
    """Added to a bfloat16 weight, it is rounded once: the nearest number of that dtype."""
    torch.manual_seed(0)
    weight, A, B = torch.randn(30, 20).to(dtype), torch.randn(4, 20), torch.randn(30, 4)
    exact = weight.double() + 0.7 * B.double() @ A.double()
    total = torch.empty_like(weight)
    add_product(total, weight, A, B, 0.7)
    if dtype == torch.bfloat16:
        assert torch.equal(total, exact.to(dtype))
    torch.testing.assert_close(total, exact.to(dtype))
    torch.testing.assert_close(row_norm(weight, A, B, 0.7).double(), exact.norm(dim=1), rtol=1e-2, atol=0)
    if dtype == torch.float32:
        torch.testing.assert_close(summed(weight, A, B, 0.7), exact.float())


def test_the_sum_is_formed_for_products_where_precision_and_arithmetic_allow_it() -> None:
    A, B = torch.zeros(2, 6), torch.zeros(3, 2)
    for dtype, allowed in ((torch.float32, True), (torch.float64, True), (torch.bfloat16, False)):
        tensors = torch.zeros(5, 6, dtype=dtype), torch.zeros(3, 6, dtype=dtype), A.to(dtype), B.to(dtype)
        assert forms(*tensors) is allowed
    with torch.autocast("cpu", torch.bfloat16):
        assert not forms(torch.zeros(5, 6), torch.zeros(3, 6), A, B)
    # T·(in + out) multiplications for each of r, against 2·in·out: at 6 → 3 that is T = 4.
    assert [forming_pays(rows, torch.zeros(3, 6), 1) for rows in (3, 4)] == [False, True]
    assert [forming_pays(rows, torch.zeros(3, 6), 4) for rows in (15, 16)] == [False, True]
