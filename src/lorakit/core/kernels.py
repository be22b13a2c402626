"""The large products of a LoRA layer, in Triton where that runs and pays, in plain torch elsewhere.

    X (T, I)   W (O, I)   A (r, I)   B (O, r)   S (T, r)   dY (T, O)   dS (T, r)   M (T, I) dropout's zeros and ones

Plain torch reads X once more for each thing it does to it, and its dropout writes a mask and a dropped copy. The
kernels (`triton_code.py` has the mathematics) read each large tensor once. Each stands beside a plain version with the
same signature: it is what the kernel is checked against, and what runs in its place. Three names switch them
(`choice.py`: LORAKIT_KERNELS, `only`):

    dropout   shrink, grad_A, add_expand_, mask   used wherever `available` says so, after a check on small tensors
    grad      grad_S_B                            used on shapes where it was timed and faster
    linear    linear_expand                       the same

`available` first, then the functions of dropout; they do not fall back themselves, because their mask comes out of the
kernel alone: a mask drawn otherwise is kept, not made again. `grad_S_B` and `linear_expand` can always be called.

They take matrices of X's or dY's dtype, float32, float16 or bfloat16, and factors of any; batches are the caller's to
flatten. This module imports no triton until a kernel runs.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from .choice import TOLERANCE, Trials, asked_for, event_seconds, is_capturing, only, sequence, sound, switched_on

__all__ = ["add_expand_", "available", "draw_seed", "grad_A", "grad_S_B", "linear_expand", "mask", "only", "shrink"]

RANKS = 256  # beyond it a thin tile is no longer thin, and does not fit into registers
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton too reads it when it is imported
Seed = Tensor | int | None

trials = Trials(event_seconds)
_sound: dict[tuple[str, torch.device, torch.dtype, int], bool] = {}


def available(x: Tensor, rank: int = 16, name: str = "dropout") -> bool:
    """Whether the kernels called `name` can be used on tensors like `x`.

    The first call for a device, dtype and (padded) rank runs them on small tensors and compares with plain torch. If
    one raises or is wrong, a warning says so and they are not used again.
    """
    if not (x.is_cuda or INTERPRETED) or x.dtype not in TOLERANCE or not 0 < rank <= RANKS:
        return False
    if type(x) not in (Tensor, nn.Parameter):  # fake, sharded, …: nothing that a kernel could read
        return False
    if name not in switched_on() or not _imported():
        return False
    from .triton_code import padded

    key = (name, x.device, x.dtype, padded(rank))
    if key not in _sound:
        if is_capturing():
            return False
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            _sound[key] = _check(*key)
    return _sound[key]


def draw_seed(device: torch.device) -> Tensor:
    """A seed () of a mask, from torch's generator of that device: nothing waits for it, and `manual_seed` sets it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def mask(seed: Tensor | int, p: float, rows: int, columns: int, device: torch.device) -> Tensor:
    """M (rows, columns) as bool: False with probability p. It follows from seed, row and column alone."""
    from .triton_code import mask as kernel

    return kernel(seed, p, rows, columns, device)


def shrink(x: Tensor, A: Tensor, scale: float, p: float = 0.0, seed: Seed = None) -> Tensor:
    """S = scale/(1−p) · (M ⊙ x) Aᵀ (T, r) in x's dtype. M is of ones where p is 0 or seed None, here and below."""
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
    """dx += M ⊙ (dS A), in place, rounded once."""
    from .triton_code import add_expand_ as kernel

    return kernel(dx, dS, A, p, seed)


def plain_add_expand_(dx: Tensor, dS: Tensor, A: Tensor, p: float = 0.0, seed: Seed = None) -> Tensor:
    return dx.add_(_masked(dS @ A.to(dx.dtype), p, seed))


def grad_S_B(dY: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """dS = scale · dY B (T, r) in dY's dtype, and dB = dYᵀ S (O, r) in that or, from the kernel, in float32."""
    (rows, outputs), rank = dY.shape, B.shape[1]
    if not _to_try(dY, rank, "grad"):
        return plain_grad_S_B(dY, B, S, scale)
    from .triton_code import grad_S_B as kernel

    if not dY.is_cuda:
        return kernel(dY, B, S, scale)
    key = ("grad", dY.dtype, _bucket(rows), outputs, rank, dY.device, B.dtype)
    with torch.cuda.device_of(dY):
        return trials.run(key, kernel, plain_grad_S_B, (dY, B, S, scale), lambda: (dY, _drawn(B), _drawn(S), scale))


def plain_grad_S_B(dY: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return (dY @ B.to(dY.dtype)).mul_(scale), (S.T @ dY).T  # dYᵀ S takes a CPU twice as long


def linear_expand(x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, B: Tensor) -> Tensor:
    """y = x Wᵀ + b + S Bᵀ (T, O) in x's dtype; weight (O, I) with strides of any kind."""
    (rows, inputs), (outputs, rank) = x.shape, B.shape
    if not _to_try(x, rank, "linear"):
        return plain_linear_expand(x, weight, bias, S, B)
    from .triton_code import linear_expand as kernel

    if not x.is_cuda:
        return kernel(x, weight, bias, S, B)
    layout = (weight.dtype, weight.is_contiguous(), bias is None, B.dtype)
    key = ("linear", x.dtype, _bucket(rows), inputs, outputs, rank, x.device, *layout)
    with torch.cuda.device_of(x):
        base = (x, weight, bias)
        return trials.run(key, kernel, plain_linear_expand, (*base, S, B), lambda: (*base, _drawn(S), _drawn(B)))


def plain_linear_expand(x: Tensor, weight: Tensor, bias: Tensor | None, S: Tensor, B: Tensor) -> Tensor:
    # The large product is added to the thin one, so that the small summand alone is rounded before the sum.
    B = B.to(x.dtype)
    y = S @ B.T if bias is None else torch.addmm(bias.to(x.dtype), S, B.T)
    return y.addmm_(x, weight.to(x.dtype).T)


def _masked(tensor: Tensor, p: float, seed: Seed) -> Tensor:
    if seed is None or p == 0:
        return tensor
    rows, columns = tensor.shape
    return tensor * mask(seed, p, rows, columns, tensor.device).to(tensor.dtype)


def _to_try(x: Tensor, rank: int, name: str) -> bool:
    """Whether the kernel may run on `x`, or be tried. The interpreter says nothing about time: it waits to be asked."""
    return available(x, rank, name) and (x.is_cuda or asked_for(name))


def _drawn(thin: Tensor) -> Tensor:
    """Normal numbers like `thin`, for a trial: B starts at zero, and zero agrees with everything."""
    generator = torch.Generator(thin.device).manual_seed(0)
    return torch.randn(thin.shape, generator=generator, dtype=thin.dtype, device=thin.device)


def _check(name: str, device: torch.device, dtype: torch.dtype, rank: int) -> bool:
    """Whether the kernels called `name` run on small tensors and agree with plain torch."""
    from . import triton_code as code

    # Several tiles and the edge of one in each direction; rows also as many as make `shrink` take its taller tiles.
    for rows in (37,) if device.type == "cpu" else (37, 64 * 256 + 5):
        shapes = [(rows, 272), (272, 272), (rank, 272), (272, rank), (rows, rank), (rows, 272)]
        x, W, A, B, S, dY = (_drawn(torch.empty(shape, dtype=dtype, device=device)) for shape in shapes)
        p, seed = 0.25, torch.tensor(2**40 + 1, device=device)
        cases: dict[str, list[tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]] = {
            "dropout": [
                (code.shrink, plain_shrink, (x, A, 0.5)),
                (code.shrink, plain_shrink, (x, A, 0.5, p, seed)),
                (code.grad_A, plain_grad_A, (S, x, p, seed)),
                (code.add_expand_, plain_add_expand_, (x, S, A, p, seed)),
            ],
            "grad": [(code.grad_S_B, plain_grad_S_B, (dY, B, S, 0.5))],
            "linear": [(code.linear_expand, plain_linear_expand, (x, W, None, S, B))],
        }
        for kernel, plain, (first, *rest) in cases[name]:
            if not sound(name, dtype, partial(_run, kernel, first, *rest), partial(_run, plain, first, *rest)):
                return False
    return True


def _run(way: Callable[..., Any], first: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`way` on a copy of its first argument, which add_expand_ writes on."""
    return sequence(way(first.clone(), *rest))


def _bucket(rows: int) -> int:
    """`rows` rounded up to a power of two: batches of about one size share a trial."""
    return 1 << (rows - 1).bit_length() if rows else 0


@cache
def _imported() -> bool:
    """Whether Triton is installed, and not broken."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import triton_code  # noqa: F401
    except Exception as error:  # whatever an installation can lack
        warnings.warn(f"lorakit does without its kernels: importing Triton raised {error!r}", stacklevel=2)
        return False
    return True
