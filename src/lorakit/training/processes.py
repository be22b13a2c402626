"""Several processes of one run, under torchrun and `accelerate launch`: the first one decides, prints and writes."""

from __future__ import annotations

import os
from typing import TypeVar

from .plan import processes

Value = TypeVar("Value")


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def of_main(value: Value) -> Value:
    """What the first process has found, in all of them. The others wait for it, however late it is."""
    if processes() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())  # it makes the processes known to each other
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]
