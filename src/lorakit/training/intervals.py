"""95 % intervals of a score over the rows that it was computed from.

    a share      k of n rows are right: Wilson's interval (Wilson 1927). It stays within [0, 1], and it is not empty at
                 0 of n and at n of n, where the textbook p ± 1.96 √(p(1 − p)/n) has no width.
    any other    the bootstrap (Efron 1979): the score of many sets of n rows that are drawn from the n rows with
                 replacement; the interval leaves out 2.5 % of these scores at each end.

They say how far the score may be off because other rows could have been held out. What another seed of the training
changes is not in them: `lorakit compare` measures that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

Ends = tuple[float, float]  # the lower and the upper end of an interval

_LEVEL = 0.95
_DRAWS = 1000


def wilson(share: float, rows: int) -> Ends:
    """The interval of a share of `rows` rows, with z = 1.96: (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)."""
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    middle = share + z * z / (2 * rows)
    half = z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    whole = 1 + z * z / rows
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


def bootstrap(score: Callable[..., float], *columns: Tensor) -> Ends | None:
    """The interval of score(*columns). columns (rows,): what the score is computed from. None for a single row.

    The rows are drawn from a generator with a fixed seed: the same columns have the same interval.
    """
    rows = len(columns[0])
    if rows < 2:
        return None
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(_DRAWS):
        chosen = torch.randint(rows, (rows,), generator=generator)
        drawn.append(score(*(column[chosen] for column in columns)))
    ends = torch.tensor(drawn, dtype=torch.float64).quantile(
        torch.tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], dtype=torch.float64)
    )
    return float(ends[0]), float(ends[1])
