"""Which rows are held out: each class has its share, a question stays on one side, earlier runs keep their rows."""

import math
import random
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction

import pytest

from lorakit.training.holdout import hold_out
from lorakit.training.shapes import Example


def labelled(counts: dict[str, int], times: int = 1) -> list[Example]:
    """Rows of each class in a mixed order; each text stands there `times` times."""
    labels = [label for label, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(labels)
    return [Example(f"d:{i}", text=f"{label} {i // times}", label=label) for i, label in enumerate(labels)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.02, 0.1, 0.33, 0.5])
@pytest.mark.parametrize(
    "counts",
    [
        {"often": 180, "sometimes": 17, "rarely": 3},
        {"a": 50, "b": 50},
        {"once": 1, "twice": 2, "rest": 97},
        {f"class {i}": i + 1 for i in range(12)},
    ],
    ids=["rare", "even", "few", "many"],
)
def test_each_class_has_its_share(counts: dict[str, int], share: float, seed: int) -> None:
    rows = labelled(counts)
    notes: list[str] = []
    left, held = hold_out(rows, share, seed, notes)
    assert sorted([*left, *held]) == list(range(len(rows)))
    number = min(100, round(share * len(rows)))
    assert len(held) == number and len(notes) == 1
    found = Counter(rows[index].label for index in held)
    for label, count in counts.items():
        exact = Fraction(number * count, len(rows))
        assert found[label] in (math.floor(exact), math.ceil(exact)), label
        assert found[label] < count  # one is left to learn from
    assert hold_out(rows, share, seed, []) == (left, held)


def test_a_rare_class_is_held_out_before_a_frequent_one_gets_a_row_more() -> None:
    """Its exact share is 0.2 rows of 10, and those of the others are 4.9."""
    rows = labelled({"a": 98, "b": 98, "rare": 4})
    chosen = set()
    for seed in range(20):
        _, held = hold_out(rows, 0.05, seed, [])
        assert Counter(rows[index].label for index in held)["rare"] == 1
        chosen.add(tuple(held))
    assert len(chosen) == 20  # which rows are held out is still drawn


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("times", [2, 3, 7])
def test_rows_that_ask_the_same_stay_together_within_a_class(times: int, seed: int) -> None:
    """The share of a class is right to within the rows of one question."""
    counts = {"a": 210, "b": 84, "c": 42}
    rows = [
        Example(f"d:{label}{i}", text=f"{label} {i % (count // times)}", label=label)
        for label, count in counts.items()
        for i in range(count)
    ]
    notes: list[str] = []
    left, held = hold_out(rows, 0.1, seed, notes)
    assert not {rows[i].text for i in held} & {rows[i].text for i in left} and len(notes) == 1
    found = Counter(rows[index].label for index in held)
    for label, count in counts.items():
        assert abs(found[label] - Fraction(34 * count, 336)) < times + 1
    assert 34 - times < len(held) <= 34


def test_one_text_with_two_labels_counts_for_both() -> None:
    rows = [Example(f"d:{i}", text=f"text {i // 2}", label="ab"[i % 2]) for i in range(60)]
    left, held = hold_out(rows, 0.1, 3, [])
    assert Counter(rows[index].label for index in held) == {"a": 3, "b": 3}
    assert not {rows[i].text for i in held} & {rows[i].text for i in left}


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [14, 23, 25, 33, 49, 51, 62, 86, 88, 97, 108, 117]),
        (1, [14, 15, 17, 20, 23, 72, 88, 91, 94, 97, 102, 108]),
        (7, [4, 6, 9, 19, 41, 55, 56, 70, 92, 105, 107, 115]),
    ],
)
def test_rows_without_labels_are_those_of_earlier_versions(seed: int, expected: list[int]) -> None:
    """A recorded run is resumed on the rows that it began with. These were held out before classes had shares."""
    rows = [Example(f"d:{i}", prompt=f"p{i * i % 37}" if i % 3 else f"q{i}", completion="c") for i in range(120)]
    assert hold_out(rows, 0.1, seed, [])[1] == expected


class Many:
    """Rows that are made when they are read, as those that lie in a file."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        return Example("d", text=f"text {index}", label=f"{index % 7}")

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(self.count))


def test_a_row_takes_few_bytes_meanwhile() -> None:
    """What it asks, its class, and its place in the order of these: 20 bytes; 8 more in what is returned."""
    peaks = []
    for count in (10_000, 30_000):
        tracemalloc.start()
        try:
            hold_out(Many(count), 0.05, 0, [])  # type: ignore[arg-type]
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 45 * 20_000
