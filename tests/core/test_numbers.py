"""Printed numbers, compared with text written by hand. Sizes: tests/training/test_report.py."""

import math

import pytest

from lorakit.core.numbers import duration, percent, rounded, short_count


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0 s"),
        (179.4, "179 s"),
        (180, "3 min"),
        (400, "7 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (86400, "24.0 h"),
    ],
)
def test_a_time_is_shown_in_the_unit_that_fits(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown


@pytest.mark.parametrize(("share", "shown"), [(None, "–"), (0.5, "50.0%"), (1.0, "100%"), (0.00012, "0.0120%")])
def test_a_share_is_shown_as_a_percentage(share: float | None, shown: str) -> None:
    assert percent(share) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (1, "1"), (500, "500"), (1000, "1k"), (2_500_000, "2.5M"), (1e9, "1B"), (1e11, "100B")],
)
def test_a_round_count_is_short_on_an_axis(count: float, shown: str) -> None:
    assert short_count(count) == shown


def test_numbers_are_stored_with_six_digits_and_what_is_no_number_as_null() -> None:
    assert rounded({"a": (1 / 3, math.nan), 0.1 + 0.2: [math.inf, 7]}) == {"a": [0.333333, None], 0.3: [None, 7]}
