"""Dropout's mask: drawn as torch draws it or, on a CPU, four times as fast, and kept as one bit for each element."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Eight bytes of 0 or 1 times _GATHER have the eight bits in the highest byte; a byte times _SPREAD, and _PICK, has
# bit i alone in byte i.
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_PICK = 0x8040201008040201 - (1 << 64)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` that does not promise torch's masks: what `attach` uses. p counts in steps of 1/65536."""


def draw_mask(x: Tensor, dropout: nn.Dropout) -> Tensor:
    """Ones, and zeros with probability p, of the shape and dtype of x: the mask that `F.dropout` would draw now.

    A `QuickDropout` on a CPU, where torch draws one number for each element, cuts four out of each random word.
    """
    if x.device.type != "cpu":
        return torch.native_dropout(x, dropout.p, True)[1].to(x.dtype)
    if type(dropout) is nn.Dropout:
        return torch.empty_like(x).bernoulli_(1 - dropout.p)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    return (lanes >= round(dropout.p * 65536) - 32768).to(x.dtype)


def pack(mask: Tensor) -> Tensor:
    """A mask of n zeros and ones as ⌈n/8⌉ bytes."""
    flat = mask.bool().reshape(-1)
    words = F.pad(flat, (0, -len(flat) % 8)).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8)


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The mask of this shape that `pack` made `bits` of, as bool."""
    words = (bits.to(torch.int64) * _SPREAD) & _PICK
    return words.view(torch.uint8)[: shape.numel()].view(shape) != 0
