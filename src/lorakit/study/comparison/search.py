"""Which learning rate of the ladder `compare` tries next: see `training/ladder.py`.

Every method may try the same number of rates on a task, with seed 0, and begins at a usual rate for its kind.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...core.init import init_of
from ...training.ladder import rung, untried
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

    tried: rate → validation score, lower is better; None if the run diverged. A score that is NaN or infinite counts as
    diverged too: the last step may have broken the weights after the last training loss.
    """
    return next(iter(next_rates(method, tried, trials)), None)


def next_rates(method: Method, tried: Mapping[float, float | None], trials: int) -> list[float]:
    """The rate to try next, and those that are tried after it unless it is the better one."""
    if tried and len(tried) >= trials:
        return []
    return untried(tried, start(method), [rung])[: max(trials - len(tried), 1)]


def start(method: Method) -> float:
    """The first rate of the search."""
    if isinstance(method, LoRA) and (method.rslora or init_of(method.init).take is not None):
        return _STRONGER
    return _START[type(method)]
