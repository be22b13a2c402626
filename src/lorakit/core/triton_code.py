# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The thin products of `LoRALinear` (linear.py) in Triton, so that each large tensor is read once.

    X (T, I)   A (r, I)   B (O, r)   S (T, r)   dY (T, O)   dS (T, r)   M (T, I) zeros and ones

    shrink         S   = s/(1−p) · (M ⊙ X) Aᵀ       M is made in registers: no mask and no dropped copy of X in memory
    grad_A         dA  = dSᵀ (M ⊙ X)
    add_expand_    dX += M ⊙ (dS A)                 dX is read and written once
    grad_S_B       dS  = s · dY B,  dB = dYᵀ S      one pass over dY

M depends only on (seed, t, i): element i of row t is kept if word i mod 4 of Philox-4x32-7, at key `seed` and counter
t·⌈I/4⌉ + ⌊i/4⌋, is at least p·2³² (Salmon et al. 2011; seven rounds is the fewest that pass BigCrush). So the backward
pass makes the same mask again, although its tiles differ, and only the eight bytes of the seed are kept.

Sums are in float32, products of float32 in full precision ("ieee", no TF32); A, B and S are cast to the dtype of X or
dY in registers. No kernel adds atomically, and no tile size is tuned by timing, so equal arguments give equal bits.
Large sums are cut into a fixed number of parts that torch adds up.

Tile sizes follow from dtype and rank by the rules beside each launch. A program keeps less than 96 KiB in shared memory
in all stages together, which every GPU since Ampere has. TMA, warp specialisation and float8 are not used.

This is the one module that imports triton; `kernels.py` decides whether it is used at all.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROUNDS = tl.constexpr(7)
SHARED = 96 * 1024  # bytes
PROGRAMS = 256  # two for each multiprocessor of the intended GPUs (108 to 148), to keep enough loads in flight


@triton.jit
def _keep(seed, threshold, rows, first, groups, COLUMNS: tl.constexpr):
    """M (rows, COLUMNS) from column `first`, a multiple of four, as bool: one call of Philox for four elements."""
    counter = rows.to(tl.int64)[:, None] * groups + (first // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    a, b, c, d = tl.randint4x(seed, counter, ROUNDS)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    return words >= threshold.to(tl.uint32)


@triton.jit
def _load(start, rows, columns, row_count, column_count):
    """Tile (rows, columns) of a contiguous matrix, zeros beyond its edges."""
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    return tl.load(start + rows.to(tl.int64)[:, None] * column_count + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(start, tile, rows, columns, row_count, column_count):
    inside = (rows[:, None] < row_count) & (columns[None, :] < column_count)
    offsets = rows.to(tl.int64)[:, None] * column_count + columns[None, :]
    tl.store(start + offsets, tile.to(start.dtype.element_ty), mask=inside)


@triton.jit
def _dot(left, right, total, DOT: tl.constexpr):
    return tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")


@triton.jit(do_not_specialize=["threshold", "rows"])
def _mask(out, seed, threshold, rows, inputs, BT: tl.constexpr, BI: tl.constexpr):
    row = tl.program_id(0) * BT + tl.arange(0, BT)
    first = tl.program_id(1) * BI
    keep = _keep(tl.load(seed), threshold, row, first, tl.cdiv(inputs, 4), BI)
    _store(out, keep, row, first + tl.arange(0, BI), rows, inputs)


@triton.jit(do_not_specialize=["threshold", "rows"])
def _shrink(
    x, A, S, seed, scale, threshold, rows, inputs, rank,
    DROP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row, ranks = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, R)
    total = tl.zeros((BT, R), tl.float32)
    for first in range(0, inputs, BI):
        column = first + tl.arange(0, BI)
        tile = _load(x, row, column, rows, inputs)
        if DROP:
            tile = tl.where(_keep(tl.load(seed), threshold, row, first, tl.cdiv(inputs, 4), BI), tile, 0.0)
        total = _dot(tile, tl.trans(_load(A, ranks, column, rank, inputs)), total, DOT)
    _store(S, total * scale, row, ranks, rows, rank)


@triton.jit(do_not_specialize=["threshold", "rows"])
def _grad_A(
    dS, x, parts, seed, threshold, rows, inputs, rank, chunk,
    DROP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (column block, part): the sum over `chunk` rows."""
    first, part, ranks = tl.program_id(0) * BI, tl.program_id(1), tl.arange(0, R)
    column = first + tl.arange(0, BI)
    total = tl.zeros((R, BI), tl.float32)
    for start in range(part * chunk, tl.minimum((part + 1) * chunk, rows), BT):
        row = start + tl.arange(0, BT)
        tile = _load(x, row, column, rows, inputs)
        if DROP:
            tile = tl.where(_keep(tl.load(seed), threshold, row, first, tl.cdiv(inputs, 4), BI), tile, 0.0)
        total = _dot(tl.trans(_load(dS, row, ranks, rows, rank)), tile, total, DOT)
    _store(parts + part.to(tl.int64) * rank * inputs, total, ranks, column, rank, inputs)


@triton.jit(do_not_specialize=["threshold", "rows"])
def _add_expand(
    dx, dS, A, seed, threshold, rows, inputs, rank,
    DROP: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0) * BI, tl.program_id(1) * BT + tl.arange(0, BT)
    column = first + tl.arange(0, BI)
    total = tl.zeros((BT, BI), tl.float32)
    for start in tl.range(0, rank, BR, num_stages=1):
        ranks = start + tl.arange(0, BR)
        thin, factor = _load(dS, row, ranks, rows, rank), _load(A, ranks, column, rank, inputs)
        total = _dot(thin, factor, total, DOT)
    if DROP:
        total = tl.where(_keep(tl.load(seed), threshold, row, first, tl.cdiv(inputs, 4), BI), total, 0.0)
    _store(dx, _load(dx, row, column, rows, inputs).to(tl.float32) + total, row, column, rows, inputs)


@triton.jit(do_not_specialize=["rows"])
def _grad_S_B(
    dY, B, S, dS_parts, dB_parts, scale, rows, outputs, rank, chunk,
    BT: tl.constexpr, BO: tl.constexpr, R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Program (row block, part): `chunk` columns of dY; each tile of it is multiplied from both sides."""
    block, part, ranks = tl.program_id(0), tl.program_id(1), tl.arange(0, R)
    row = block * BT + tl.arange(0, BT)
    thin = _load(S, row, ranks, rows, rank)
    total = tl.zeros((BT, R), tl.float32)
    dB = dB_parts + block.to(tl.int64) * outputs * rank
    for first in range(part * chunk, tl.minimum((part + 1) * chunk, outputs), BO):
        column = first + tl.arange(0, BO)
        tile = _load(dY, row, column, rows, outputs)
        total = _dot(tile, _load(B, column, ranks, outputs, rank), total, DOT)
        _store(dB, _dot(tl.trans(tile), thin, tl.zeros((BO, R), tl.float32), DOT), column, ranks, outputs, rank)
    _store(dS_parts + part.to(tl.int64) * rows * rank, total * scale, row, ranks, rows, rank)


def _launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on the device of `first`, which need not be the current one."""
    with torch.cuda.device_of(first):
        # Fused multiply-adds are Triton's default, which is about to change. Asking for them keeps the results.
        kernel[grid](first, *arguments, **constants, enable_fp_fusion=True)


def _dot_dtype(tensor: Tensor) -> Any:
    """The dtype of both tiles of a product: that of the large one.

    Triton's interpreter would multiply the bits of bfloat16 as integers, so float32 is used there.
    """
    bfloat16 = tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: bfloat16}[tensor.dtype]


def padded(rank: int) -> int:
    """The width of a thin tile: products need at least 16, and a power of two."""
    return max(16, 1 << (rank - 1).bit_length())


def _steps(x: Tensor, bytes_each: int, free: int = SHARED) -> int:
    """How many steps of a loop fit into a tile, if each takes `bytes_each` in all stages: a power of two, 16 to 128.

    For float32 it is at most 32: its products are unrolled into single multiply-adds, and more would spill registers.
    """
    return min(128 if x.element_size() == 2 else 32, max(16, 1 << (free // bytes_each).bit_length() - 1))


def _random(p: float, seed: Tensor | int, device: torch.device) -> tuple[Tensor, int]:
    """The kernels' (seed, threshold). A seed on the device is read there; copying an int makes the host wait."""
    place = seed if isinstance(seed, Tensor) else torch.tensor(seed, device=device)
    return place, min(round(p * 2**32), 2**32 - 1)


def _drop(p: float, seed: Tensor | int | None, device: torch.device) -> tuple[Tensor | None, int, bool]:
    """The kernels' (seed, threshold, DROP)."""
    return (None, 0, False) if seed is None or p == 0 else (*_random(p, seed, device), True)


def mask(seed: Tensor | int, p: float, rows: int, columns: int, device: torch.device, tile: int = 64) -> Tensor:
    out = torch.empty(rows, columns, dtype=torch.bool, device=device)
    grid = (triton.cdiv(rows, 32), triton.cdiv(columns, tile))
    _launch(_mask, grid, out, *_random(p, seed, device), rows, columns, BT=32, BI=tile)
    return out


def shrink(x: Tensor, A: Tensor, scale: float, p: float = 0.0, seed: Tensor | int | None = None) -> Tensor:
    x, A = x.contiguous(), A.contiguous()
    (rows, inputs), rank = x.shape, A.shape[0]
    S = x.new_empty(rows, rank)
    R = padded(rank)
    # Each program reads all of A from the L2 cache. Smaller tiles make more programs, larger ones read A less often.
    BT = 32 if rows < 64 * PROGRAMS else 64
    BI = _steps(x, 3 * (BT * x.element_size() + R * A.element_size()))
    place, threshold, DROP = _drop(p, seed, x.device)
    arguments = (x, A, S, place, scale / (1 - p), threshold, rows, inputs, rank)
    constants = dict(DROP=DROP, BT=BT, BI=BI, R=R, DOT=_dot_dtype(x))
    _launch(_shrink, (triton.cdiv(rows, BT),), *arguments, **constants, num_warps=4, num_stages=3)
    return S


def grad_A(dS: Tensor, x: Tensor, p: float = 0.0, seed: Tensor | int | None = None) -> Tensor:
    dS, x = dS.contiguous(), x.contiguous()
    (rows, inputs), rank = x.shape, dS.shape[1]
    R = padded(rank)
    BI = 128 // x.element_size()  # a row of the tile is one cache line
    BT = _steps(x, 3 * (BI * x.element_size() + R * dS.element_size()))
    # Enough parts for PROGRAMS programs: four at I = 4096. Together they take 1 MiB of float32 for each 16 of rank,
    # while X takes 32 MiB at T = 4096 in bfloat16.
    chunk = _chunk(rows, BT, PROGRAMS // triton.cdiv(inputs, BI))
    count = triton.cdiv(rows, chunk)
    parts = x.new_empty(count, rank, inputs, dtype=torch.float32)
    place, threshold, DROP = _drop(p, seed, x.device)
    arguments = (dS, x, parts, place, threshold, rows, inputs, rank, chunk)
    constants = dict(DROP=DROP, BT=BT, BI=BI, R=R, DOT=_dot_dtype(x))
    warps = 4 if R <= 64 else 8
    _launch(_grad_A, (triton.cdiv(inputs, BI), count), *arguments, **constants, num_warps=warps, num_stages=3)
    return parts.sum(0)


def add_expand_(dx: Tensor, dS: Tensor, A: Tensor, p: float = 0.0, seed: Tensor | int | None = None) -> Tensor:
    if not dx.is_contiguous():
        return dx.copy_(add_expand_(dx.contiguous(), dS, A, p, seed))
    dS, A = dS.contiguous(), A.contiguous()
    (rows, inputs), rank = dx.shape, dS.shape[1]
    BT, BI, BR = (64, 128, min(padded(rank), 64)) if dx.element_size() == 2 else (32, 64, 16)
    place, threshold, DROP = _drop(p, seed, dx.device)
    arguments = (dx, dS, A, place, threshold, rows, inputs, rank)
    constants = dict(DROP=DROP, BT=BT, BI=BI, BR=BR, DOT=_dot_dtype(dx))
    grid = (triton.cdiv(inputs, BI), triton.cdiv(rows, BT))
    _launch(_add_expand, grid, *arguments, **constants, num_warps=4, num_stages=2)
    return dx


def grad_S_B(dY: Tensor, B: Tensor, S: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    dY, B, S = dY.contiguous(), B.contiguous(), S.contiguous()
    (rows, outputs), rank = dY.shape, B.shape[1]
    R = padded(rank)
    # Each row block writes one dB and each column part one dS in float32, and torch adds them up. Writing and reading
    # them costs 4·r·(1/BT + 1/chunk) of reading dY in bfloat16. So BT is as large as its float32 sums (BT, R) allow
    # (16384 numbers, 256 rows at most), and the columns are cut only as far as PROGRAMS needs. For r = 16:
    #
    #       T      O   parts of dB  of dS       bytes   beside dY
    #    4096   4096            16     16       8 MiB      32 MiB
    #   16384   4096            64      4      20 MiB     128 MiB
    #   16384  14336            64      4      60 MiB     448 MiB
    #
    # At r = 32 these bytes double, and reading dY twice costs no more, so `kernels.grad_S_B` uses plain products there.
    size = dY.element_size()
    BT = min(256, (16384 if size == 2 else 4096) // R, max(16, triton.next_power_of_2(rows)))
    # Shared memory holds S, two stages of dY and B, and one tile of dB.
    BO = min(64, _steps(dY, 2 * (BT * size + R * B.element_size()) + R * 4, free=SHARED - BT * R * size))
    blocks = triton.cdiv(rows, BT)
    chunk = _chunk(outputs, BO, PROGRAMS // max(1, blocks))
    count = triton.cdiv(outputs, chunk)
    dS_parts = dY.new_empty(count, rows, rank, dtype=torch.float32)
    dB_parts = dY.new_empty(blocks, outputs, rank, dtype=torch.float32)
    arguments = (dY, B, S, dS_parts, dB_parts, scale, rows, outputs, rank, chunk)
    constants = dict(BT=BT, BO=BO, R=R, DOT=_dot_dtype(dY))
    _launch(_grad_S_B, (blocks, count), *arguments, **constants, num_warps=8, num_stages=2)
    return dS_parts.sum(0).to(dY.dtype), dB_parts.sum(0)


def _chunk(length: int, tile: int, parts: int) -> int:
    """The length of each of at most `parts` parts of `length`, in whole tiles."""
    tiles = -(-length // tile)
    return tile * max(1, -(-tiles // max(1, parts)))
