"""A model in eval mode for a while. Modules of one model may be in different modes, so each gets its own back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module of `model` is in eval mode, without dropout. Afterwards each is in its earlier mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # A parent comes before its children and sets them too, so what is left are those that differ from their parent.
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)
