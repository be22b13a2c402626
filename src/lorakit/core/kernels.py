"""The thin products of a LoRA layer on a GPU, in Triton. LORAKIT_KERNELS=0 turns them off.

    X (T, I)   A (r, I)   B (O, r)   S (T, r)   dY (T, O)   dS (T, r)   M (T, I) dropout's zeros and ones

Plain torch reads X again for each operation, and its dropout writes a mask and a dropped copy. The kernels
(`triton_code.py` has the mathematics) read each large tensor once, and make dropout's mask in registers:

    mask, shrink, grad_A, add_expand_     the products with M, which is kept as a seed of eight bytes
    grad_S_B                              dS and dB in one pass over dY

They are used wherever Triton is installed, because with dropout they are faster on every layer that was measured
(docs/performance.md, "On a GPU"). Before their first use they are compared with plain torch on small tensors.

Call `available` first: the first four have no fallback, since only the kernel can make its mask again. `grad_S_B` can
always be called. All take matrices of X's or dY's dtype (float32, float16 or bfloat16) and factors of any dtype; the
caller flattens batches. This module does not import triton until a kernel is needed.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .errors import LoraError

TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # plain float32 may be TF32
RANKS = 256  # beyond it a thin tile is no longer thin, and does not fit into registers
# `triton_code.grad_S_B` writes partial sums and reads them again. At rank 32 they take as many bytes as the second
# reading of dY that the kernel saves.
ONE_PASS_RANKS = 16
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton also reads it when it is imported
Seed = Tensor | int | None

_sound: dict[tuple[torch.device, torch.dtype, int], bool] = {}


def switched_on() -> bool:
    """Whether LORAKIT_KERNELS leaves the kernels on."""
    value = os.environ.get("LORAKIT_KERNELS", "1").strip()
    if value not in ("", "0", "1"):
        raise LoraError(f"LORAKIT_KERNELS={value!r}: expected 1 (use the kernels, the default) or 0 (plain torch).")
    return value != "0"


def available(x: Tensor, rank: int = 16) -> bool:
    """Whether the kernels can be used on tensors like `x`.

    The first call for a device, dtype and (padded) rank runs them on small tensors and compares with plain torch. If
    one raises or is wrong, a warning says so, and none is used for that device, dtype and rank from then on.
    """
    if not (x.is_cuda or INTERPRETED) or x.dtype not in TOLERANCE or not 0 < rank <= RANKS:
        return False
    if type(x) not in (Tensor, nn.Parameter):  # fake, sharded, …: a kernel cannot read these
        return False
    if not switched_on() or not _imported():
        return False
    from .triton_code import padded

    key = (x.device, x.dtype, padded(rank))
    if key not in _sound:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # a CUDA graph is being captured, which allows no waiting and so no comparison
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _sound[key] = _check(*key)
    return _sound[key]


def draw_seed(device: torch.device) -> Tensor:
    """A seed () of a mask, from torch's generator of that device, so `manual_seed` sets it. The host does not wait."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def mask(seed: Tensor | int, p: float, rows: int, columns: int, device: torch.device) -> Tensor:
    """M (rows, columns) as bool: False with probability p. It depends only on seed, row and column."""
    from .triton_code import mask as kernel

    return kernel(seed, p, rows, columns, device)


def shrink(x: Tensor, A: Tensor, scale: float, p: float = 0.0, seed: Seed = None) -> Tensor:
    """S = scale/(1−p) · (M ⊙ x) Aᵀ (T, r) in x's dtype. Here and below, M is all ones if p is 0 or seed is None."""
    from .triton_code import shrink as kernel

    return kernel(x, A, scale, p, seed)


def plain_shrink(x: Tensor, A: Tensor, scale: float, p: float = 0.0, seed: Seed = None) -> Tensor:
    return (_masked(x, p, seed) @ A.to(x.dtype).T).mul_(scale / (1 - p))


def grad_A(dS: Tensor, x: Tensor, p: float = 0.0, seed: Seed = None) -> Tensor:
    """dA = dSᵀ (M ⊙ x) (r, I) in float32; dS carries scale/(1−p)."""
    from .triton_code import grad_A as kernel

    return kernel(dS, x, p, seed)


def plain_grad_A(dS: Tensor, x: Tensor, p: float = 0.0, seed: Seed = None) -> Tensor:
    return (dS.T @ _masked(x, p, seed)).float()


def add_expand_(dx: Tensor, dS: Tensor, A: Tensor, p: float = 0.0, seed: Seed = None) -> Tensor:
    """dx += M ⊙ (dS A), in place and rounded once. Returns dx."""
    from .triton_code import add_expand_ as kernel

    return kernel(dx, dS, A, p, seed)


def plain_add_expand_(dx: Tensor, dS: Tensor, A: Tensor, p: float = 0.0, seed: Seed = None) -> Tensor:
    return dx.add_(_masked(dS @ A.to(dx.dtype), p, seed))


def grad_S_B(dY: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dS = scale · dY B (T, r) in dY's dtype, and dB = dYᵀ S (O, r) in dY's dtype, or float32 from the kernel."""
    rank = B.shape[1]
    if rank > ONE_PASS_RANKS or not available(dY, rank):
        return plain_grad_S_B(dY, B, S, scale)
    from .triton_code import grad_S_B as kernel

    return kernel(dY, B, S, scale)


def plain_grad_S_B(dY: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return (dY @ B.to(dY.dtype)).mul_(scale), (S.T @ dY).T  # dYᵀ S would take a CPU twice as long


def _masked(tensor: Tensor, p: float, seed: Seed) -> Tensor:
    if seed is None or p == 0:
        return tensor
    rows, columns = tensor.shape
    return tensor * mask(seed, p, rows, columns, tensor.device).to(tensor.dtype)


def _check(device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether the kernels run on small tensors and agree with plain torch; if not, a warning says so."""
    from . import triton_code as code

    generator = torch.Generator(device).manual_seed(0)
    # Several tiles and a partial one in each direction. On a GPU, also enough rows for the taller tiles of `shrink`.
    for rows in (37,) if device.type == "cpu" else (37, 64 * 256 + 5):
        shapes = [(rows, 272), (rank, 272), (272, rank), (rows, rank), (rows, 272)]
        x, A, B, S, dY = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for shape in shapes)
        p, seed = 0.25, torch.tensor(2**40 + 1, device=device)
        cases: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = [
            (code.shrink, plain_shrink, (x, A, 0.5)),
            (code.shrink, plain_shrink, (x, A, 0.5, p, seed)),
            (code.grad_A, plain_grad_A, (S, x, p, seed)),
            (code.add_expand_, plain_add_expand_, (x, S, A, p, seed)),
            (code.grad_S_B, plain_grad_S_B, (dY, B, S, 0.5)),
        ]
        for kernel, plain, (first, *rest) in cases:
            name = plain.__name__.removeprefix("plain_")
            try:  # with a copy of the first argument, because add_expand_ writes to it
                agrees = agree(_each(kernel(first.clone(), *rest)), _each(plain(first.clone(), *rest)), dtype)
                fault = "" if agrees else f"the result of {name} differs from plain torch's"
            except Exception as error:  # from a compiler, a driver or a launcher: plain torch is used then
                fault = f"{name} raised {type(error).__name__}: {error}"
            if fault:
                warnings.warn(
                    f"lorakit's kernels are not used for {dtype}: {fault}. Plain torch takes their place. To silence "
                    "this, set LORAKIT_KERNELS=0.",
                    stacklevel=3,
                )
                return False
    return True


def agree(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether the tensors are equal up to the rounding of `dtype`, relative to the largest expected element."""
    return all(
        bool((left.float() - right.float()).abs().max() <= TOLERANCE[dtype] * right.float().abs().max())
        for left, right in zip(got, expected, strict=True)
    )


def _each(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


@cache
def _imported() -> bool:
    """Whether Triton is installed and can be imported."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import triton_code  # noqa: F401
    except Exception as error:  # whatever an installation can lack
        warnings.warn(f"lorakit does without its kernels: importing Triton raised {error!r}", stacklevel=2)
        return False
    return True
