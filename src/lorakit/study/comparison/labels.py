"""Place the labels of a plot's points: each near its point, where it covers the least.

All places are tried for each label, the most crowded point first, and all labels are placed twice. Places are in
pixels, x to the right and y upwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Spot = tuple[float, float]

LINE = 13.0  # height of a label at 12 px
_CHARACTER = 6.6  # width of one of its letters, rounded up
_RADII = (9.0, 15.0, 24.0, 36.0, 50.0, 68.0, 90.0, 120.0)  # from a point to its label
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))


@dataclass(frozen=True)
class Box:
    """A rectangle by its lower left corner."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0.0) * max(height, 0.0)

    def holds(self, spot: Spot) -> bool:
        return self.x < spot[0] < self.x + self.width and self.y < spot[1] < self.y + self.height

    def nearest(self, spot: Spot) -> Spot:
        """The point of the box that is nearest to `spot`."""
        return min(max(spot[0], self.x), self.x + self.width), min(max(spot[1], self.y), self.y + self.height)


def placed(
    places: Sequence[Spot], labels: Sequence[str], area: Box, bars: Iterable[Box], lines: Iterable[tuple[Spot, Spot]]
) -> list[Box]:
    """A box for each label beside its place, within the area. bars, lines: what is already drawn."""
    fixed = [*bars, *(Box(x - 6, y - 6, 12, 12) for x, y in places)]
    lined = [spot for a, b in lines for spot in _between(a, b)]
    boxes: dict[int, Box] = {}

    def crowd(index: int) -> float:
        return min((math.dist(places[index], other) for i, other in enumerate(places) if i != index), default=0.0)

    def best(index: int) -> Box:
        others = [box for other, box in boxes.items() if other != index]
        leaders = [
            spot for i, box in boxes.items() if i != index for spot in _between(places[i], box.nearest(places[i]))
        ]
        choices: list[tuple[float, int, Box]] = []
        for radius, box in _around(places[index], _CHARACTER * len(labels[index]), area):
            under = sum(box.overlap(other) for other in (*fixed, *others))
            over = sum(box.holds(spot) for spot in (*lined, *leaders))
            leader = _between(places[index], box.nearest(places[index]))
            crossed = sum(other.holds(spot) for spot in leader for other in others)
            choices.append((100 * under + 6 * over + 40 * crossed + radius, len(choices), box))
        return min(choices)[2]

    # The first labels were placed without knowing the later ones, so each may move once more.
    for index in 2 * sorted(range(len(places)), key=crowd):
        boxes[index] = best(index)
    return [boxes[index] for index in range(len(places))]


def _around(place: Spot, width: float, area: Box) -> list[tuple[float, Box]]:
    """The places for a label of this width, each with its distance."""
    x, y = place
    found = []
    for radius in _RADII:
        for right, up in _DIRECTIONS:
            left = x + right * radius + width * ((right > 0) - (right < 0) - 1) / 2
            bottom = y + up * radius - LINE / 2
            left = min(max(left, area.x), area.x + area.width - width)
            bottom = min(max(bottom, area.y), area.y + area.height - LINE)
            found.append((radius, Box(left, bottom, width, LINE)))
    return found


def _between(a: Spot, b: Spot) -> list[Spot]:
    """Points on the line from a to b, close enough together that a label on the line contains one."""
    count = math.ceil(math.dist(a, b) / 6) or 1
    return [(a[0] + (b[0] - a[0]) * step / count, a[1] + (b[1] - a[1]) * step / count) for step in range(count + 1)]
