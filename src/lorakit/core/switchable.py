"""A layer whose update can be taken out of the forward pass for a while: what `disabled` looks for."""

from __future__ import annotations

from torch import nn


class Switchable(nn.Module):
    """disabled_by: how many `disabled(model)` are open. The forward pass leaves the update out if any is."""

    disabled_by: int = 0

    @property
    def has_update(self) -> bool:
        """Whether there is an update to leave out."""
        raise NotImplementedError

    def disable(self) -> None:
        """Take the update out of the forward pass, until `enable` was called as often."""
        self.disabled_by += 1

    def enable(self) -> None:
        """Take one `disable` back."""
        self.disabled_by -= 1
