"""What a frozen base keeps moving by itself in `train()`: the running statistics of norms.

They are no parameters, so no `requires_grad` holds them; and no file of an adapter would have them, so base and adapter
would differ from the model that was trained. They are frozen with the base: such a module goes on as in `eval()`,
whatever mode the model is in. What is trained whole (`also_train`) keeps its statistics moving, and they are saved.
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
    """What comes before the class of a module whose statistics are frozen: it is never in training.

    `train()` and `eval()` are noted all the same, for when the module is given back.
    """

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode


def freeze_statistics(module: nn.Module) -> None:
    """Hold what the module would move in training; other modules stay as they are."""
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
