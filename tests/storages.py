"""What is made, how large it is, and how long it stays in memory."""

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Made(TorchDispatchMode):
    """The bytes of every storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.sizes.append(tensor.untyped_storage().nbytes())
        return result


class Outputs:
    """Counts, before each forward pass of a model, in `alive`, how many earlier passes' logits are still in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.alive: list[int] = []
        self._made: list[StorageWeakRef] = []
        self._hooks = [model.register_forward_pre_hook(self._before), model.register_forward_hook(self._after)]

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: object) -> None:
        self.alive.append(sum(not storage.expired() for storage in self._made))

    def _after(self, model: nn.Module, inputs: object, output: Any) -> None:
        self._made.append(StorageWeakRef(output.logits.untyped_storage()))
