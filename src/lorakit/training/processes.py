"""A run of several processes, under torchrun or `accelerate launch`: the first process decides, prints and writes."""

from __future__ import annotations

import os
from typing import TypeVar

from .plan import processes

Value = TypeVar("Value")


def is_main() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def of_main(value: Value) -> Value:
    """Share the first process's value with all processes. The others wait for it without a time limit."""
    if processes() == 1:
        return value
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    PartialState(cpu=not torch.cuda.is_available())  # connects the processes
    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


def say(text: str) -> None:
    """Print in the first process."""
    if is_main():
        print(text, flush=True)
