"""Walk on a ladder of settings to where the score is best: the search of `compare` and of `train --auto`.

A point is a setting, or several of them as an ordered tuple. An axis says what the next higher and the next lower point
is in one of them. The walk tries the neighbours of the best point so far, the higher one first. It stays on the axis
that led to the best point while there is something untried, and then takes the others in their order. It ends when all
neighbours of the best point were tried and none is better.

    points  1e-4  3e-4  1e-3  3e-3          a learning rate: `rung`
    tried          2nd   1st   …

A lower score is better. None and NaN mean that a run diverged, which is worse than any score.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

Point = TypeVar("Point", bound=Any)  # ordered: of equally good ones the lower is the better
Axis = Callable[[Point, int], Point | None]  # the neighbour of a point, higher (+1) or lower (−1); None: there is none
Scores = Mapping[Point, float | None]


def untried(tried: Scores[Point], start: Point, axes: Sequence[Axis[Point]]) -> list[Point]:
    """The points to try next, in the order of preference; none when the search is over.

    First these are the start and its neighbours on the first axis. If all diverged, it is the next lower one of the
    lowest.
    """
    if not tried:
        return [start, *_neighbours(start, axes[0])]
    best = best_tried(tried)
    if best is None:
        return [point for point in [axes[0](min(tried), -1)] if point is not None]
    around = [_neighbours(best, axis) for axis in axes]
    around.sort(key=lambda points: not any(point in tried for point in points))  # stable: else in the order of the axes
    found = ([point for point in points if point not in tried] for points in around)
    return next((points for points in found if points), [])


def best_tried(tried: Scores[Point]) -> Point | None:
    """The best of the points that did not diverge; of equally good ones the lower. None if all diverged."""
    scores = {point: score for point, score in tried.items() if score is not None and not math.isnan(score)}
    return min(scores, key=lambda point: (scores[point], point), default=None)


def rung(rate: float, by: int) -> float:
    """The neighbour of a learning rate on …, 1e-4, 3e-4, 1e-3, …, as the float of its decimal digits (no product)."""
    mantissa, _, exponent = f"{rate:.0e}".partition("e")
    number = 2 * int(exponent) + (mantissa == "3") + by
    return float(f"{'3' if number % 2 else '1'}e{number // 2}")


def _neighbours(point: Point, axis: Axis[Point]) -> list[Point]:
    return [neighbour for by in (1, -1) if (neighbour := axis(point, by)) is not None]
