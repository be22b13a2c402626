"""The search for a learning rate, compared with its rule on the whole ladder, and on constructed scores."""

import itertools
import math
import random
from collections.abc import Callable, Iterable

import pytest

from lorakit.study.comparison.search import next_rate, start
from lorakit.study.methods.baselines import METHODS, BitFit, Full, LoRA, Method, PrefixLayer
from lorakit.training.ladder import best_tried

LADDER = [float(f"{digit}e{power}") for power in range(-12, 7) for digit in (1, 3)]
Loss = Callable[[float], float | None]


def walk(method: Method, loss: Loss, trials: int) -> dict[float, float | None]:
    """The rates that the search tries, in order."""
    tried: dict[float, float | None] = {}
    while (rate := next_rate(method, tried, trials)) is not None:
        assert rate not in tried
        tried[rate] = loss(rate)
        assert len(tried) <= trials
    return tried


def rungs(rates: Iterable[float]) -> list[int]:
    return [LADDER.index(rate) for rate in rates]


def by_the_rule(begin: int, loss: Loss, trials: int) -> list[int]:
    """The rule in other words, on numbers of rungs: a run of neighbours that grows next to its best, or down.

    A diverged run is +∞; of equal scores, the lower rung counts as better.
    """

    def worse(rung: int) -> tuple[float, int]:
        score = loss(LADDER[rung])
        return math.inf if score is None else score, rung

    tried = [begin]
    while len(tried) < trials:
        low, high = min(tried), max(tried)
        best = min(tried, key=worse)
        if loss(LADDER[best]) is None:
            tried.append(low - 1)
        elif best == high:
            tried.append(high + 1)
        elif best == low:
            tried.append(low - 1)
        else:
            break
    return tried


def test_every_method_begins_on_the_ladder_where_its_kind_is_trained() -> None:
    for name, make in METHODS.items():
        assert start(make()) in LADDER, name
    assert start(Full()) < start(LoRA()) < start(PrefixLayer())
    assert start(LoRA(rslora=True)) == start(LoRA(init="pissa")) == 3e-4
    assert start(LoRA(init="gaussian")) == start(LoRA()) == 1e-3  # its update starts at zero too
    assert start(LoRA(dora=True)) == start(LoRA(rank=64)) == 1e-3


@pytest.mark.parametrize("away", range(-6, 7))
def test_one_valley_is_found_from_any_distance(away: int) -> None:
    begin = LADDER.index(1e-3)
    lowest = LADDER[begin + away]

    def loss(rate: float) -> float:
        return abs(math.log(rate / lowest))

    tried = walk(BitFit(), loss, trials=20)
    assert best_tried(tried) == lowest
    # Every rung on the way and both neighbours of the best, the higher one first.
    way = [*range(begin, begin + away, 1 if away > 0 else -1), begin + away]
    if away < 0:
        way.insert(1, begin + 1)
    around = [rung for rung in (begin + away + 1, begin + away - 1) if rung not in way]
    assert rungs(tried) == way + around


@pytest.mark.parametrize("trials", [1, 2, 3, 4])
def test_the_budget_is_spent_but_never_exceeded(trials: int) -> None:
    for sign in (1, -1):  # a slope without an end
        assert len(walk(BitFit(), lambda rate: sign * rate, trials)) == trials  # noqa: B023 (called here)
    assert rungs(walk(BitFit(), lambda rate: -rate, trials)) == [18 + i for i in range(trials)]


def test_divergence_is_worse_than_any_score() -> None:
    assert list(walk(BitFit(), lambda rate: None, 4)) == [1e-3, 3e-4, 1e-4, 3e-5]
    assert list(walk(BitFit(), lambda rate: None if rate > 1e-4 else 1e9, 4)) == [1e-3, 3e-4, 1e-4, 3e-5]
    assert list(walk(BitFit(), lambda rate: None if rate > 1e-3 else -rate, 9)) == [1e-3, 3e-3, 3e-4]
    assert best_tried({1e-3: None, 3e-4: math.inf}) == 3e-4
    assert best_tried({1e-3: None, 3e-4: None}) is None
    assert best_tried({}) is None


def test_a_score_that_is_no_number_counts_as_diverged() -> None:
    """Only validation finds weights that the last step made NaN."""
    for rates in itertools.permutations([1e-3, 3e-4, 1e-4]):
        scores = {1e-3: math.nan, 3e-4: 0.7, 1e-4: 0.5}
        assert best_tried({rate: scores[rate] for rate in rates}) == 1e-4
    assert best_tried({1e-3: math.nan}) is None
    assert next_rate(BitFit(), {1e-3: math.nan}, 4) == 3e-4


def test_of_equals_the_lower_rate_is_best() -> None:
    assert best_tried({1e-3: 0.5, 3e-4: 0.5, 3e-3: 0.5}) == 3e-4
    assert list(walk(BitFit(), lambda rate: 0.5, 5)) == [1e-3, 3e-3, 3e-4, 1e-4, 3e-5]


def test_the_next_rate_does_not_depend_on_the_order_of_what_was_tried() -> None:
    for scores, following in (((0.5, 0.4, 0.6), None), ((0.5, 0.4, 0.3), 3e-2), ((0.3, 0.4, 0.5), 3e-4)):
        tried = dict(zip((1e-3, 3e-3, 1e-2), scores, strict=True))
        for order in itertools.permutations(tried.items()):
            assert next_rate(BitFit(), dict(order), 9) == following


@pytest.mark.parametrize("seed", range(60))
def test_random_scores_are_walked_as_the_rule_says(seed: int) -> None:
    draw = random.Random(seed)
    # Few different scores, so that ties are common; some rates diverge.
    scores = {rate: draw.choice([None, 0.0, 1.0, 2.0, math.inf]) for rate in LADDER}
    method = draw.choice([make() for make in METHODS.values()])
    trials = draw.randint(1, 8)
    assert rungs(walk(method, scores.__getitem__, trials)) == by_the_rule(
        LADDER.index(start(method)), scores.__getitem__, trials
    )
