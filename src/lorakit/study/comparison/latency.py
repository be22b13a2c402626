"""How much longer a forward pass takes with a method than without it, measured in turns.

In each turn both models run on the same rows, and the ratio of their times is one value: what slows the machine for
longer than a turn slows both. A fast model runs several times in a turn, and the shortest time counts, so that a turn
is longer than the slice of time for which the system may give the processor to another program. The result is the
median of the ratios. Its interval needs no assumption on how they
are distributed: of n independent ratios each is below the median with probability 1/2, so the median lies between the
k-th smallest and the k-th largest one with probability

    1 − 2 Σ_{i<k} C(n, i) / 2ⁿ                          (David & Nagaraja, Order Statistics, 2003, section 7.1)

and the largest k is taken for which this is at least 0.95. Turns of one process are alike in what does not change
within it, such as where the weights lie in memory. So the intervals of several runs are not made one of all turns: the
interval of a method reaches from the lowest to the highest end of its runs' intervals.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

TURNS = 9  # the fewest whose interval leaves out the most extreme turn at each end
_LEAST = 0.03  # seconds of a model in a turn: several slices of Linux's scheduler

Seconds = tuple[float, ...]  # one for each turn
Ends = tuple[float, float]


def in_turns(serve: Callable[[nn.Module], None], ours: nn.Module, base: nn.Module) -> tuple[Seconds, Seconds]:
    """The seconds of serve(ours) and of serve(base) in each turn. The order changes from turn to turn.

    A turn before the first is not counted: it makes kernels and takes memory.
    """
    seconds: tuple[list[float], list[float]] = ([], [])
    pairs = [(ours, seconds[0]), (base, seconds[1])]
    with torch.inference_mode():
        for turn in range(TURNS + 1):
            for model, times in pairs if turn % 2 else reversed(pairs):
                times.append(_shortest(serve, model))
    return tuple(seconds[0][1:]), tuple(seconds[1][1:])


def _shortest(serve: Callable[[nn.Module], None], model: nn.Module) -> float:
    """The shortest time of the model in one turn."""
    spent, shortest = 0.0, math.inf
    while spent < _LEAST:
        began = time.perf_counter()
        serve(model)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        spent, shortest = spent + seconds, min(shortest, seconds)
    return shortest


def ratio_of(runs: Sequence[tuple[Seconds, Seconds]]) -> tuple[float, Ends | None]:
    """The median of all turns' ratios, and the interval; None if a run has too few turns for one.

    runs: for each run the seconds with the method, and without it.
    """
    ratios = [[one / other for one, other in zip(ours, base, strict=True)] for ours, base in runs]
    median = statistics.median([ratio for own in ratios for ratio in own])
    ends = [_interval(own) for own in ratios]
    known = [one for one in ends if one is not None]
    if len(known) < len(ends):
        return median, None
    return median, (min(low for low, _ in known), max(high for _, high in known))


def _interval(values: Sequence[float]) -> Ends | None:
    """The 95 % interval of the median of the distribution that the values were drawn from. None for fewer than six."""
    ordered, count = sorted(values), len(values)
    kept = outside = 0  # outside / 2ⁿ is the probability that fewer than `kept` values are below the median
    while 40 * (outside := outside + math.comb(count, kept)) <= 2**count:  # a fortieth at each end
        kept += 1
    return (ordered[kept - 1], ordered[-kept]) if kept else None
