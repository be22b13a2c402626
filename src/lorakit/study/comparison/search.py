"""The search for a learning rate on the ladder …, 1e-4, 3e-4, 1e-3, 3e-3, …: find where the validation score is best.

Every method may try the same number of rates on a task, with seed 0, and begins at a usual rate for its kind. The next
rate is a neighbour of the best one so far, the higher first. The search ends when both neighbours are worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...core.init import init_of
from ..methods.baselines import (
    BitFit,
    Full,
    HeadOnly,
    Houlsby,
    LoRA,
    Method,
    Pfeiffer,
    PrefixEmbedding,
    PrefixLayer,
    TopLayers,
)

_START = {
    Full: 1e-4,
    TopLayers: 1e-4,
    BitFit: 1e-3,
    HeadOnly: 3e-3,
    Houlsby: 1e-3,
    Pfeiffer: 1e-3,
    PrefixEmbedding: 1e-2,
    PrefixLayer: 1e-2,
    LoRA: 1e-3,
}
_STRONGER = 3e-4  # for LoRA whose update moves faster: scaled by α/√r, or with factors of the weight itself (PiSSA)


def next_rate(method: Method, tried: Mapping[float, float | None], trials: int) -> float | None:
    """The rate to try next, or None when the search is over.

    tried: rate → validation score, lower is better; None if the run diverged, which is worse than any score. A score
    that is NaN or infinite is worse too: the last step may have broken the weights after the last training loss.
    """
    if not tried:
        return start(method)
    if len(tried) >= trials:
        return None
    best = best_rate(tried)
    if best is None:
        return _step(min(tried), -1)
    return next((rate for rate in (_step(best, 1), _step(best, -1)) if rate not in tried), None)


def best_rate(tried: Mapping[float, float | None]) -> float | None:
    """The best of the rates that did not diverge; of equally good ones the lower. None if all diverged."""
    scores = {rate: score for rate, score in tried.items() if score is not None and not math.isnan(score)}
    return min(scores, key=lambda rate: (scores[rate], rate), default=None)


def start(method: Method) -> float:
    """The first rate of the search."""
    if isinstance(method, LoRA) and (method.rslora or init_of(method.init).take is not None):
        return _STRONGER
    return _START[type(method)]


def _step(rate: float, by: int) -> float:
    """The neighbour of a rate on the ladder, as the float of its decimal digits (3e-4, not a product)."""
    mantissa, _, exponent = f"{rate:.0e}".partition("e")
    rung = 2 * int(exponent) + (mantissa == "3") + by
    return float(f"{'3' if rung % 2 else '1'}e{rung // 2}")
