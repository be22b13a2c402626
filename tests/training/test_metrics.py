import pytest

from lorakit.training.metrics import accuracy, exact_match, pearson


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        (" yes\n", "yes", True),
        ("Yes", "yes", False),
        ('{"b": [1, 2], "a": true}', '{"a":true,"b":[1,2]}', True),
        ('{"a": 1}', '{"a": true}', False),
        ('{"a": [1]}', '{"a": [true]}', False),
        ('{"a": 1.0}', '{"a": 1}', True),
        ('{"a": [2, 1]}', '{"a": [1, 2]}', False),
        ('{"a": 1', '{"a": 1}', False),
        ("1.0", "1", False),
        ('{"a": 1} trailing', '{"a": 1}', False),
    ],
)
def test_exact_match(answer: str, expected: str, same: bool) -> None:
    assert exact_match(answer, expected) is same


def test_accuracy_and_pearson() -> None:
    assert accuracy(["a", "b", "c", "d"], ["a", "b", "c", "x"]) == 0.75
    assert pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([1, 1, 1], [1, 2, 3]) == 0
    assert pearson([0.1, 0.1, 0.1], [1, 2, 3]) == 0  # sum([0.1] * 3) / 3 is not 0.1
    assert pearson([1, 2, 3], [0.1, 0.1, 0.1]) == 0
