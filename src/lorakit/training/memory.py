"""Memory of a training step: counted on a model of fake tensors before it runs, measured while it does.

Counted: one step, forward and backward, runs on tensors that have shapes and no contents, and every storage that an
operation makes is noted, and when it dies. The peak of what lives at once is what a GPU's allocator reports. A CPU's
heap has holes besides. glibc's allocator leaves a freed block between two living ones where it is, and does not use it
for a tensor of the same size, because an aligned block needs a few bytes more. Over a step that keeps tensors of all
layers and drops others between them this adds up to half of what lives, so the noted blocks are laid out as glibc would
lay them out.

Not counted: the buffers that libraries of matrix products keep (held small, `few_kernels`), and the small objects
of Python and autograd.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import itertools
import os
import platform
import resource
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
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


def step_storages(model: nn.Module, loss: Callable[[], Tensor], accumulation: int = 1) -> Events:
    """What one step of `accumulation` batches makes and frees beside the model: activations, temporaries, gradients."""
    storages = _Storages(itertools.chain(model.parameters(), model.buffers()))
    with storages:
        for _ in range(min(accumulation, 2)):  # the second finds the gradients of the first; more find no more
            loss().backward()
        model.zero_grad()
    return storages.events


def live_peak(events: Events) -> int:
    """Most bytes that live at once."""
    return max(itertools.accumulate(size for _, size in events), default=0)


# glibc's malloc.c: a block over 32 MiB (DEFAULT_MMAP_THRESHOLD_MAX, which the threshold grows to when blocks of such
# sizes are freed) has pages of its own, given back when it is freed. Tensors ask for 64 bytes' alignment, and
# posix_memalign looks for a hole with room for that and for the smallest block (32) besides.
_OWN_PAGES = 32 * 2**20
_ALIGNED = 96
_STEPS = 3  # the holes of one step shape the next; after three they grow no more


def glibc_peak(events: Events) -> int:
    """Most bytes that glibc's allocator takes from the system for `_STEPS` such steps in a row.

    The heap is one line of blocks. A request takes the smallest hole that it and its alignment fit into, the rest stays
    a hole, and neighbouring holes become one.
    """
    blocks: dict[int, tuple[int, int]] = {}  # number: (where, size); where is −1 for a block with pages of its own
    holes: list[tuple[int, int]] = []  # (size, where), sorted
    starts: dict[int, int] = {}  # where: size, of the same holes
    ends: dict[int, int] = {}  # end: where
    top = pages = peak = 0

    def add(where: int, size: int) -> None:
        bisect.insort(holes, (size, where))
        starts[where], ends[where + size] = size, where

    def remove(where: int) -> int:
        size = starts.pop(where)
        del ends[where + size], holes[bisect.bisect_left(holes, (size, where))]
        return size

    for number, change in events * _STEPS:
        if change > 0:
            size = -(-change // 16) * 16
            if size >= _OWN_PAGES:
                pages += size
                blocks[number] = (-1, size)
            elif (index := bisect.bisect_left(holes, (size + _ALIGNED, 0))) < len(holes):
                where = holes[index][1]
                hole = remove(where)
                add(where + size, hole - size)
                blocks[number] = (where, size)
            else:
                # The free end of the heap is not in the list of holes, so it grows by what it lacks.
                blocks[number] = (top, size)
                top += size
        elif number in blocks:
            where, size = blocks.pop(number)
            if where < 0:
                pages -= size
                continue
            if where in ends:
                before = ends[where]
                size += remove(before)
                where = before
            if where + size in starts:
                size += remove(where + size)
            if where + size == top:
                top = where
            else:
                add(where, size)
        peak = max(peak, top + pages)
    return peak


def memory_of(device: torch.device) -> int:
    """Bytes that a process may hold on the device in all: a GPU's own; for a CPU memory and swap, within the limit of
    its control group, as a container has one. 0 where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    lines = dict(line.split(":", 1) for line in _lines("/proc/meminfo") if ":" in line)
    held = sum(int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal") if name in lines)
    if not held:
        with contextlib.suppress(ValueError, OSError, AttributeError):  # each system has its own names
            held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([held, *_group_limits()])


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
