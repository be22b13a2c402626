"""A number that tells whether someone wrote on a tensor: for writes that leave no other trace (`weight.data.copy_`).

It reads the tensor once, in about a twentieth of the time of a merge. It adds up integers, whose sum does not depend on
the order, so it never says "changed" of a tensor that is the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LANES = 64  # words of 64 bits in a block
_SMALL = 1 << 13  # words that are mixed in no time


@torch.no_grad()
def fingerprint(tensor: Tensor) -> Tensor | None:
    """An integer () of the tensor's bits, or None for a tensor without bits to read (meta, fake, sharded, quantised).

    The bits are read as words of 64. Blocks of words are added up, and each sum is multiplied by its block's number, so
    that blocks cannot change places unseen. The words of small tensors are also mixed, each by its place in the block;
    in a large one an exchange of elements within a block remains unseen.
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
    # In float64 the signs are the words' highest bits, and an even number of those adds up to nothing.
    if flat.dtype == torch.float64 or parts[0].numel() < _SMALL:
        places = _odd(_LANES, flat.device)
        parts = [(part ^ (part >> 31)) * places for part in parts]
    sums = torch.cat([part.sum(1) for part in parts])
    return (sums * _odd(len(sums), flat.device)).sum()


def _odd(count: int, device: torch.device) -> Tensor:
    """The first odd numbers: multiplying by one of them loses no bit."""
    return torch.arange(1, 2 * count, 2, device=device)
