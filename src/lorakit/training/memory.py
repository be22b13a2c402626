"""Memory of a training step: counted on a model of fake tensors before it runs, measured while it does.

Counted: one step, forward and backward, runs on tensors that have shapes and no contents, and every storage that an
operation makes is noted, and when it dies. The peak of what lives at once is what a GPU's allocator reports.

A process on a CPU holds more, and `margin` says how much: the allocator leaves holes where tensors were freed between
others that are kept, oneDNN keeps the kernels that it makes (`few_kernels` keeps them few), and autograd and Python
have small objects.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import platform
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Events = list[tuple[int, int]]  # (number of a storage, its bytes when it is made, −its bytes when it is freed)


class _Storages(TorchDispatchMode):
    """Notes every storage that operations make, and its end; those of `known` were there before."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.events: Events = []
        self._numbers = itertools.count()
        # A weak reference keeps no storage alive and tells when it dies, before its address is used again.
        self._alive: dict[int, Any] = {tensor.untyped_storage()._cdata: None for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._alive:
            return
        number = next(self._numbers)

        def freed(_: Any) -> None:
            del self._alive[address]
            self.events.append((number, -size))

        self._alive[address] = weakref.ref(storage, freed)
        self.events.append((number, size))


@dataclass(frozen=True)
class Storages:
    """What one training step makes and frees beside the model. events: all of it, in order. forward: how many of the
    events belong to the forward pass of the first batch.
    """

    events: Events
    forward: int

    @property
    def living(self) -> int:
        """Most bytes that live at once."""
        return max(itertools.accumulate(size for _, size in self.events), default=0)

    @property
    def in_heap(self) -> int:
        """Bytes of all storages that the forward pass makes, freed or not, without those with pages of their own."""
        return sum(size for _, size in self.events[: self.forward] if 0 < size < _OWN_PAGES)


# glibc takes a block of this size from the system and gives it back when it is freed; smaller blocks share the heap.
_OWN_PAGES = 2**25


def step_storages(model: nn.Module, loss: Callable[[], Tensor], accumulation: int = 1) -> Storages:
    """What one step of `accumulation` batches makes and frees beside the model: activations, temporaries, gradients."""
    storages = _Storages(itertools.chain(model.parameters(), model.buffers()))
    forward = 0
    with storages:
        for _ in range(min(accumulation, 2)):  # the second finds the gradients of the first; more find no more
            value = loss()
            forward = forward or len(storages.events)
            value.backward()
            del value
        model.zero_grad()
    return Storages(storages.events, forward)


# A freed block of the heap is often not used again for a block of the same size: torch asks for aligned memory, for
# which glibc needs some bytes more. So each layer of a forward pass may leave holes as large as its temporaries, also
# under gradient checkpointing, where little is alive. Ten trainings of four models (SmolLM2, a GPT-2, a Qwen2, a BERT;
# Linux, glibc 2.36, two threads) held beyond what was counted 0.09 to 0.37 of what the forward pass made in the heap.
# `benchmarks/plan.py` compares their plans with what they take.
_SHARE, _CONSTANT = 0.33, 100_000_000


def margin(in_heap: int) -> int:
    """Bytes that a process on a CPU may hold beside what is counted, where the forward pass makes `in_heap` bytes."""
    return round(_SHARE * in_heap) + _CONSTANT


def memory_of(device: torch.device) -> int:
    """Bytes that a process may hold on the device in all: a GPU's own; for a CPU memory and swap, within the limit of
    its control group, as a container has one. 0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    held = _meminfo("MemTotal") + _meminfo("SwapTotal")
    if not held:
        with contextlib.suppress(ValueError, OSError, AttributeError):  # each system has its own names
            held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([held, *_group_limits()])


def free_memory_of(device: torch.device) -> int:
    """Bytes that a process may hold on the device beside what other processes hold there now: `memory_of` where the
    system does not say. On a CPU swap is left out, and what this process holds already is counted.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _meminfo("MemAvailable")
    return min(available + resident_memory(), memory_of(device)) if available else memory_of(device)


def _meminfo(name: str) -> int:
    """A line of /proc/meminfo in bytes, 0 where there is none."""
    found = [line for line in _lines("/proc/meminfo") if line.startswith(name + ":")]
    return int(found[0].split()[1]) * 1024 if found else 0


def _group_limits() -> list[int]:
    """The limits of the process's control groups, of version 2 or 1; a group's ancestors limit it too."""
    found = []
    for line in _lines("/proc/self/cgroup"):
        _, controllers, own = line.split(":", 2)
        root, name = Path("/sys/fs/cgroup"), "memory.max"
        if controllers:  # version 1 has a tree for each
            root, name = root / "memory", "memory.limit_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        group = root / own.lstrip("/")
        for folder in (group, *group.parents):
            # A container sees its own group as the root, whatever its name is outside.
            if folder == root or root in folder.parents:
                found += [int(text) for text in _lines(str(folder / name)) if text.isdigit()]
    return found


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="ignore").splitlines()
    return []


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest point since `forget_peak`: of the process on a CPU, of the tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak(device: torch.device) -> None:
    """Begin `peak_memory` anew, where the system can: on a GPU, and on Linux.

    What loading the model left free in the heap is given back to the system first.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    if on_glibc():
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


@contextlib.contextmanager
def few_kernels() -> Iterator[None]:
    """Let oneDNN keep 32 of the kernels that it makes, one for each shape of a product, in place of 1024.

    In bfloat16 every new length of row brings some 60, about 9 MB, scattered over the heap: 24 batches of the demo held
    0.33 GB more with all of them, and were no faster. oneDNN reads it before the process's first product, and from the
    environment alone; the user's own values stay, and ours are gone after the block.
    """
    ours = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"} - os.environ.keys()
    os.environ.update(dict.fromkeys(ours, "32"))
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def resident_memory() -> int:
    """Bytes that the process holds now; the most it ever held where the system does not say."""
    return _status("VmRSS") or peak_memory(torch.device("cpu"))


def on_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes, 0 where there is none."""
    found = [line for line in _lines("/proc/self/status") if line.startswith(name + ":")]
    return int(found[0].split()[1]) * 1024 if found else 0
