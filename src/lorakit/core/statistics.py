"""What a frozen base changes by itself in `train()`: the running statistics of norms, and spectral_norm's vectors.

They are not parameters, so `requires_grad` does not hold them. An adapter's file does not hold them either, so base and
adapter together would differ from the trained model. So they are frozen with the base: such a module behaves as in
`eval()`, whatever the model's mode. A module trained whole (`also_train`) keeps moving its statistics, and they are
saved.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrizations import _SpectralNorm

from .joined import joined
from .undo import change_class, note


class FrozenStatistics(nn.Module):
    """The base class put before that of a module whose statistics are frozen: the module is never in training.

    `train()` and `eval()` are still noted, for when the module gets its own class back.
    """

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode


def freeze_statistics(module: nn.Module) -> None:
    """Freeze what the module would move in training. A module that moves nothing stays as it is."""
    moves = isinstance(module, _SpectralNorm) or (isinstance(module, _NormBase) and module.running_mean is not None)
    if moves and not isinstance(module, FrozenStatistics | LazyModuleMixin):
        cls: Any = type(module)
        change_class(module, joined(FrozenStatistics, cls, cls.__name__))


def thaw_statistics(module: nn.Module) -> None:
    undo: Any = note(module)
    if isinstance(module, FrozenStatistics):
        module.__class__ = undo.original_class


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that its state dict holds."""
    transient = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module._buffers.items() if buffer is not None and name not in transient}
