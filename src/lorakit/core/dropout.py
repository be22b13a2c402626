"""Dropout on the input of an update: its mask M drawn cheaply, kept in few bytes, applied where it is needed.

    x′ = M ⊙ x / (1 − p)       dx = M ⊙ dx′ / (1 − p)       M = 0 with probability p, else 1

(Srivastava et al. 2014; on the x that A reads, as in Hu et al.'s loralib.) x (T, in) are rows; M has the same shape.
The factor 1/(1 − p) goes into the update's scale, so a mask only makes zeros.

Kept whole, M would take as much memory as x until the backward pass. Drawing one random number for each element would
take a CPU longer than the products of a small layer. So there are three forms, each a small tensor between the passes:

    Bits      any p: one bit for each element.
    Gaps      p up to 1/8, on a CPU: the distance from each dropped element to the next, in one byte each, or more for a
              small p. The gaps are geometrically distributed, so about p·n random numbers give a mask of n elements,
              and dropping writes p·n zeros.
    Seeded    on a GPU with Triton: the seed alone. `kernels.py` makes the mask in registers.

For x (512, 576), which are 4 sequences of 128 tokens, and p = 0.05: M has 512 · 576 = 294,912 elements, of which about
14,746 are zero. x in float32 takes 1,179,648 bytes, Bits 36,864, Gaps 15,481 (a few to spare), Seeded 8.

`Mask` itself drops nothing. `draw_mask` chooses the form. Not here: dropout modules of other classes, of which only the
forward pass is known. The plain equations call any dropout module as it is, also torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from . import kernels

Dropout = Callable[[Tensor], Tensor]  # x → x′, zeros and the factor 1/(1 − p) in one, as nn.Dropout does it

# Eight bytes of 0 or 1, multiplied by _GATHER, have the eight bits in the highest byte. A byte, multiplied by _SPREAD
# and masked by _PICK, has only bit i in byte i.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_PICK = 0x8040201008040201 - (1 << 64)

# Above this p a byte for each dropped element takes more memory than a bit for each element.
_MOST_FOR_GAPS = 1 / 8
# If fewer dropped elements than this are expected, a mask might have none, which `Gaps` cannot represent.
_LEAST_FOR_GAPS = 64


class QuickDropout(nn.Dropout):
    """An `nn.Dropout` that need not draw the same masks as torch, so it can draw faster. `attach` uses it."""


def can_draw(dropout: Dropout | None) -> bool:
    """Whether `draw_mask` can draw this dropout's mask. Of other classes, only the forward pass is known."""
    return dropout is None or (
        isinstance(dropout, nn.Dropout)
        and type(dropout) in (nn.Dropout, QuickDropout)
        and dropout.training
        and dropout.p < 1
    )


class Mask:
    """A mask M over rows x (T, in) that drops nothing. packed: what is kept of a mask. p: the probability of a zero."""

    def __init__(self, packed: Tensor | None = None, p: float = 0.0) -> None:
        self.packed, self.p = packed, p

    def masked(self, x: Tensor) -> Tensor:
        """M ⊙ x, differentiable."""
        return x

    def mask_(self, x: Tensor) -> Tensor:
        """x ← M ⊙ x."""
        return x

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        """(M ⊙ x) Aᵀ     x (T, in), A (r, in) → (T, r)"""
        return self.masked(x) @ A.T

    def gradient_of_x(self, dY: Tensor, weight: Tensor, dS: Tensor, A: Tensor) -> Tensor:
        """dY W + M ⊙ (dS A)     dY (T, out), W (out, in), dS (T, r), A (r, in) → (T, in)"""
        return self.mask_(dS @ A).addmm_(dY, weight)

    def gradient_of_A(self, dS: Tensor, x: Tensor) -> Tensor:
        """dSᵀ (M ⊙ x)     → (r, in)"""
        return dS.T @ self.masked(x)


def mask_seed() -> int:
    """A seed of the masks of one call of a layer, from torch's generator; any number among fake tensors."""
    drawn = torch.randint(2**31, ())
    return 0 if isinstance(drawn, FakeTensor) else int(drawn)


def draw_mask(x: Tensor, dropout: nn.Dropout, rank: int, seed: int | None = None) -> Mask:
    """A mask over x (…, in), seen as rows, each element dropped with probability p.

    For `nn.Dropout` itself it is the mask that `F.dropout` would draw now. A `QuickDropout` uses the GPU kernels if
    they run for this rank. On a CPU it draws fewer random numbers than torch, which draws one for each element, and
    from a generator of its own. So torch's generator moves by one number, whatever p and the size of x are, and each of
    several adapters in a batch has the mask that it has alone.

    seed: of a QuickDropout's mask on a CPU; None draws one.
    """
    p = dropout.p
    if type(dropout) is QuickDropout and kernels.available(x, rank):
        return Seeded.draw(x.device, p)
    if x.device.type != "cpu":
        dense = torch.native_dropout(x, p, True)[1].to(x.dtype)
    elif type(dropout) is nn.Dropout:
        dense = torch.empty_like(x).bernoulli_(1 - p)
    else:
        generator = torch.Generator().manual_seed(mask_seed() if seed is None else seed)
        if p <= _MOST_FOR_GAPS and p * x.numel() >= _LEAST_FOR_GAPS:
            return Gaps.draw(x.numel(), p, generator)
        drawn = _random(x.numel(), torch.int16, generator)
        dense = (drawn.view(x.shape) >= round(p * 65536) - 32768).to(x.dtype)
    return Bits.of(dense.reshape(-1, x.shape[-1]), p)


class Bits(Mask):
    """Any mask, a bit for each element."""

    _dense: Tensor | None = None

    @classmethod
    def of(cls, dense: Tensor, p: float) -> Bits:
        """The mask of these zeros and ones."""
        mask = cls(pack(dense), p)
        mask._dense = dense
        return mask

    def masked(self, x: Tensor) -> Tensor:
        return x * self._like(x)

    def mask_(self, x: Tensor) -> Tensor:
        return x.mul_(self._like(x))

    def _like(self, x: Tensor) -> Tensor:
        """Zeros and ones in x's dtype: torch multiplies by a bool three times as slowly."""
        if self._dense is None:
            assert self.packed is not None
            self._dense = unpack(self.packed, x.shape).to(x.dtype)
        return self._dense


class Gaps(Mask):
    """Gaps between dropped elements, the first counted from position −1; zeros pad the end."""

    _positions: Tensor | None = None

    @classmethod
    def draw(cls, size: int, p: float, generator: torch.Generator | None = None) -> Gaps:
        """Draw a mask with `size` elements.

        A gap is 1 + ⌊ln u / ln(1 − p)⌋, with u uniform in [0, 1]. Fewer than one gap in 100,000 is too large for its
        bytes, and is cut.
        """
        log_keep = math.log1p(-p)
        dtypes = (torch.uint8, torch.int16, torch.int32)
        dtype = next(own for own in dtypes if torch.iinfo(own).max * log_keep < math.log(1e-5) or own == dtypes[-1])
        expected = p * size
        count = math.ceil(expected + 6 * math.sqrt(expected)) + 6  # too few for one mask in 10⁹: its end is kept
        uniform = _random(count, torch.int32, generator).to(torch.float32).mul_(2**-32).add_(0.5)
        gaps = uniform.log_().mul_(1 / log_keep)
        gaps = gaps.clamp_max_(torch.iinfo(dtype).max - 1).to(dtype).add_(1)
        return cls(gaps.mul_(gaps.cumsum(0, dtype=torch.int64) <= size), p)

    def masked(self, x: Tensor) -> Tensor:
        return x.reshape(-1).index_fill(0, self._dropped(), 0).view(x.shape)

    def mask_(self, x: Tensor) -> Tensor:
        x.view(-1).index_fill_(0, self._dropped(), 0)
        return x

    def _dropped(self) -> Tensor:
        if self._positions is None:
            assert self.packed is not None
            self._positions = self.packed.cumsum(0, dtype=torch.int64).sub_(1)
        return self._positions


class Seeded(Mask):
    """A seed, from which the kernels make the mask whenever they need it.

    The kernels have no derivative, so second derivatives use plain products with the whole mask.
    """

    @classmethod
    def draw(cls, device: torch.device, p: float) -> Seeded:
        return cls(kernels.draw_seed(device), p)

    def masked(self, x: Tensor) -> Tensor:
        return x * self._like(x)

    def mask_(self, x: Tensor) -> Tensor:
        return x.mul_(self._like(x))

    def shrink(self, x: Tensor, A: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().shrink(x, A)
        return kernels.shrink(x, A, 1 - self.p, self.p, self.packed)  # the kernel divides by 1 − p

    def gradient_of_x(self, dY: Tensor, weight: Tensor, dS: Tensor, A: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().gradient_of_x(dY, weight, dS, A)
        return kernels.add_expand_(dY @ weight, dS, A, self.p, self.packed)

    def gradient_of_A(self, dS: Tensor, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().gradient_of_A(dS, x)
        return kernels.grad_A(dS, x, self.p, self.packed)

    def _like(self, x: Tensor) -> Tensor:
        assert self.packed is not None
        return kernels.mask(self.packed, self.p, x.shape[0], x.shape[1], x.device).to(x.dtype)


def _random(count: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Uniform integers over all of `dtype`, cut from 64-bit words, because torch draws a word for each number."""
    words = torch.empty(-(-count * dtype.itemsize // 8), dtype=torch.int64)
    words = words.random_(-(1 << 63), None, generator=generator)
    return words.view(dtype)[:count]


def pack(mask: Tensor) -> Tensor:
    """A mask of n zeros and ones as ⌈n/8⌉ bytes."""
    flat = mask.bool().reshape(-1)
    words = F.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask of this shape that `pack` turned into `bits`, as bool."""
    words = (bits.to(torch.int64) * _SPREAD) & _PICK
    return words.view(torch.uint8)[: shape.numel()].view(shape) != 0
