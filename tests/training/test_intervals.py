"""Intervals of scores, against other implementations of them."""

import math

import pytest
import torch
from scipy import stats

from lorakit.training.intervals import bootstrap, wilson


@pytest.mark.parametrize(("right", "rows"), [(0, 1), (1, 1), (0, 96), (78, 96), (96, 96), (3, 7), (500, 10_000)])
def test_the_interval_of_a_share_is_wilsons(right: int, rows: int) -> None:
    expected = stats.binomtest(right, rows).proportion_ci(0.95, method="wilson")
    assert wilson(right / rows, rows) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_the_bootstrap_covers_a_mean_as_theory_says() -> None:
    """For the mean of many numbers the interval is mean ± 1.96 σ/√n, up to the noise of the draws."""
    values = torch.randn(400, dtype=torch.float64) * 3 + 10
    low, high = bootstrap(lambda own: float(own.mean()), values) or (0.0, 0.0)
    half = 1.96 * float(values.std(correction=0)) / math.sqrt(400)
    assert (low, high) == pytest.approx((float(values.mean()) - half, float(values.mean()) + half), abs=0.12 * half)


def test_the_bootstrap_draws_rows_and_keeps_their_columns_together() -> None:
    first = torch.arange(30, dtype=torch.float64)
    second = 2 * first + 1
    seen: list[bool] = []

    def score(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append(torch.equal(b, 2 * a + 1) and a.shape == (30,))
        return float(a.mean())

    found = bootstrap(score, first, second)
    assert all(seen) and len(seen) == 1000
    expected = stats.bootstrap(
        (first.numpy(),), lambda x, axis: x.mean(axis=axis), method="percentile", random_state=0
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=0.5)
    assert bootstrap(score, first, second) == found


def test_a_single_row_has_no_bootstrap_interval() -> None:
    assert bootstrap(lambda own: float(own.mean()), torch.ones(1)) is None
