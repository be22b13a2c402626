"""`Factored`: the matrix W + L R as a tensor that is multiplied without being formed.

A layer that is called can compute its update beside its weight. A weight that is read (torch's attention hands
`in_proj_weight` to a function, a mixture of experts hands over a stack of matrices) has no such place: what is read
must itself be W + ΔW. Forming that costs a dense matrix for each expert in the forward pass and a dense gradient in the
backward pass. Such code reads a `Factored` instead: torch's functions treat it as W + L R, and a product with it is
computed as two thin products beside that of W:

    x (W + L R)ᵀ = x Wᵀ + (x Rᵀ) Lᵀ        F.linear, matmul, bmm, grouped_mm

For attention of width 64 and r = 4: W (192, 64), with 192 rows because q, k and v have 64 each; L (192, 4); R (4, 64).
x (2, 9, 64) is 18 rows, because 2 sequences of 9 tokens are one matrix, and x Rᵀ (18, 4) has 4 numbers for each.

Rows, single experts and transposes of it are `Factored` too. For every other function the matrix is formed, which is
slower and gives the same result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import lora_linear
from .matrix import precise


class Factored(Tensor):
    """base + left @ right     base (…, rows, columns), left (…, rows, r), right (…, r, columns)"""

    base: Tensor
    left: Tensor
    right: Tensor

    @staticmethod
    def __new__(cls, base: Tensor, left: Tensor, right: Tensor) -> Factored:
        wants_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (base, left, right))
        self: Factored = Tensor._make_wrapper_subclass(
            cls, base.shape, strides=base.stride(), dtype=base.dtype, device=base.device, requires_grad=wants_gradient
        )
        self.base, self.left, self.right = base, left, right
        return self

    def dense(self) -> Tensor:
        """The matrix, formed in float32 at least and rounded once."""
        return (precise(self.base) + precise(self.left) @ precise(self.right)).to(self.base.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func) or _HANDLERS_BY_NAME.get(getattr(func, "__name__", ""))
        result = handler(func, *args, **kwargs) if handler else NotImplemented
        if result is NotImplemented:
            result = func(*_formed(args), **_formed(kwargs))
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} reached past the functions of torch with a weight that is not formed: merge the model")


def _formed(value: Any) -> Any:
    """`value` with every `Factored` in it formed."""
    if isinstance(value, Factored):
        return value.dense()
    if isinstance(value, tuple | list):
        return type(value)(_formed(item) for item in value)
    if isinstance(value, dict):
        return {key: _formed(item) for key, item in value.items()}
    return value


def _linear(func: Any, x: Any, weight: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, Factored) or weight.dim() != 2:
        return NotImplemented
    return lora_linear(x, weight.base, bias, weight.right, weight.left, 1.0)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Factored) and isinstance(b, Factored):
        return NotImplemented
    if isinstance(a, Factored):
        return func(a.base, b) + func(a.left.to(b.dtype), func(a.right.to(b.dtype), b))
    return func(a, b.base) + func(func(a, b.left.to(a.dtype)), b.right.to(a.dtype))


def _reflected_matmul(func: Any, a: Any, b: Any) -> Any:
    return _matmul(torch.matmul, b, a)


def _grouped_mm(func: Any, x: Any, weight: Any, offs: Any = None, **others: Any) -> Any:
    """Rows of x (T, rows) times the matrix of their group, weight (groups, rows, columns)."""
    if isinstance(x, Factored) or weight.dim() != 3 or any(value is not None for value in others.values()):
        return NotImplemented
    left, right = weight.left.to(x.dtype), weight.right.to(x.dtype)
    # The kernels need rows of a multiple of 16 bytes, so the rank is padded with zeros.
    missing = -left.shape[-1] % (16 // x.element_size())
    left, right = F.pad(left, (0, missing)), F.pad(right, (0, 0, 0, missing))
    return func(x, weight.base, offs=offs) + func(func(x, left, offs=offs), right, offs=offs)


def _getitem(func: Any, weight: Factored, index: Any) -> Any:
    if weight.dim() == 2 and isinstance(index, slice):
        return Factored(weight.base[index], weight.left[index], weight.right)
    if weight.dim() == 3 and (isinstance(index, int | slice) or (isinstance(index, Tensor) and index.dim() <= 1)):
        return Factored(weight.base[index], weight.left[index], weight.right[index])
    return NotImplemented


def _transpose(func: Any, weight: Factored, *dims: int) -> Any:
    if dims and {dim % weight.dim() for dim in dims} != {weight.dim() - 2, weight.dim() - 1}:
        return NotImplemented
    return Factored(weight.base.mT, weight.right.mT, weight.left.mT)


def _attention(func: Any, *args: Any, **kwargs: Any) -> Any:
    """`F.multi_head_attention_forward`, which takes the matrices of q, k and v as one, or one by one."""
    arguments = inspect.signature(func).bind(*args, **kwargs).arguments
    fused = arguments["in_proj_weight"]
    if isinstance(fused, Factored):
        size = len(fused) // 3
        parts = {f"{name}_proj_weight": fused[i * size : (i + 1) * size] for i, name in enumerate("qkv")}
        arguments |= {"in_proj_weight": None, "use_separate_proj_weight": True, **parts}
    # The separate weights go to F.linear, so they stay as they are. Any other `Factored` would lead here again.
    separate = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    return func(**{name: value if name in separate else _formed(value) for name, value in arguments.items()})


_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cpu", "is_cuda", "is_meta", "is_nested", "is_sparse")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.element_size, Tensor.is_contiguous),
}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.multi_head_attention_forward: _attention,
    **dict.fromkeys((torch.matmul, torch.mm, torch.bmm), _matmul),
    **dict.fromkeys((Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__), _matmul),
    Tensor.__rmatmul__: _reflected_matmul,
    Tensor.__getitem__: _getitem,
    **dict.fromkeys((torch.transpose, Tensor.transpose, Tensor.t, torch.t), _transpose),
    **dict.fromkeys((getattr(Tensor, name).__get__ for name in ("T", "mT")), _transpose),
}
# These are not in every version of torch, or are transformers'.
_HANDLERS_BY_NAME = dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped_mm)
