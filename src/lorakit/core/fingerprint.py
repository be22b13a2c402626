"""A number that tells whether a tensor was written to, even if that left no other trace (`weight.data.copy_`).

Computing it reads the tensor once, in about a twentieth of the time of a merge. It is a sum of integers, which does not
depend on the order, so an unchanged tensor always has the same number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LANES = 64  # words of 64 bits in a block
_SMALL = 1 << 13  # words; mixing so few takes almost no time


@torch.no_grad()
def tensor_fingerprint(tensor: Tensor) -> Tensor | None:
    """An integer () of the tensor's bits, or None for a tensor without bits to read (meta, fake, sharded, quantised).

    The bits are read as words of 64 bits. The words of each block are added up, and each sum is multiplied by a number
    that depends on the block's place, so two blocks cannot change places unnoticed. The words of small tensors, and of
    float64 ones, are also mixed by their place in the block. In other large tensors an exchange of elements within a
    block remains unnoticed.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.is_floating_point():
        return None
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()
    size = 8 // flat.element_size() * _LANES
    whole = len(flat) // size * size
    rest = F.pad(flat[whole:], (0, size - len(flat) + whole))
    parts = [part.view(torch.int64).view(-1, _LANES) for part in (flat[:whole], rest)]
    # In float64 the signs are the words' highest bits, and an even number of those cancels out in the sum.
    if flat.dtype == torch.float64 or parts[0].numel() < _SMALL:
        places = _odd(_LANES, flat.device)
        parts = [(part ^ (part >> 31)) * places for part in parts]
    sums = torch.cat([part.sum(1) for part in parts])
    return (sums * _odd(len(sums), flat.device)).sum()


def _odd(count: int, device: torch.device) -> Tensor:
    """The first `count` odd numbers: multiplying a word by one of them loses no bit."""
    return torch.arange(1, 2 * count, 2, device=device)
