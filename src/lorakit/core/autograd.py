"""What torch asks of a gradient that is written by hand.

A hand-written gradient (`torch.autograd.Function`) computes only what it was written for. torch's own operations also
follow the rules below. This module follows them for all hand-written products:

    autocast               picks the dtype of products, also inside a backward pass    cast, without_autocast
    compile, torch.func    rewrite the computation, and know torch's operations only   by_hand, is_transformed
    weights of a class     (quantised, sharded) define their own products              by_hand
    writing in place       must work on what a layer returned, `y += residual`         reshaped

Not here: the equations (`linear.py`, `conv.py`, `embedding.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .dropout import Dropout, can_draw

# Classes of weights with ordinary products. The memory plan uses fake tensors (training/memory.py).
_PLAIN = (Tensor, nn.Parameter, FakeTensor)


def by_hand(weight: Tensor, dropout: Dropout | None) -> bool:
    """Whether a gradient written by hand may be used with this weight and dropout, here and now."""
    return can_draw(dropout) and type(weight) in _PLAIN and not is_transformed()


def is_transformed() -> bool:
    """Whether something rewrites the computation: torch.compile, which fuses the plain equation better than any
    hand-written gradient, or a torch.func transform (vmap, jvp), which knows the plain operations only.
    """
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


def cast(x: Tensor) -> Tensor:
    """`x` cast once, as autocast would cast it. Without this, autocast casts and keeps a copy for each product."""
    return x.to(product_dtype(x))


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products with x: its own, or autocast's."""
    device = x.device.type
    if _autocasts(device) and x.is_floating_point() and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which products keep the dtypes they are given, also when backward() is called inside autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if _autocasts(device) else nullcontext()


def _autocasts(device: str) -> bool:
    """Whether autocast is on. torch refuses the question for tensors without data."""
    return device != "meta" and torch.is_autocast_enabled(device)


def reshaped(fresh: Tensor, shape: Sequence[int]) -> Tensor:
    """`fresh` in another shape, and not as a view. Nothing else may hold `fresh`.

    What a layer returns may be written on (`relu_`, `y += residual`). Autograd forbids that for a view that was made
    inside a Function or under `no_grad`. torch's own F.linear gives its rows their shape in this way too.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return fresh.view(shape)  # in an operation without a name, the trace would take this call's sizes for constants
    result: Tensor = torch.ops.aten._unsafe_view.default(fresh, shape)
    return result
