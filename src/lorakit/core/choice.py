"""Whether a kernel is used: what is switched on, and which of two ways was faster on a shape.

A kernel is a second way to compute what plain torch computes, and it can be the slower way on a GPU or a shape that
nobody tried, or not compile, or be wrong. So it has to show itself first: `agree` compares it with plain torch, and a
`Trials` times both, once for each shape, and remembers the faster. Nothing is looked up in a table of GPUs.

    LORAKIT_KERNELS=0              none
    LORAKIT_KERNELS=dropout,grad   these
    LORAKIT_KERNELS=1, or unset    all
    with only("linear"): …         the same inside a program, over whatever the variable says

The two ways round differently. Which is taken follows from a clock, so two runs may differ in the last bits; under
`torch.use_deterministic_algorithms(True)` nothing is timed, and the plain way is taken.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

NAMES = ("dropout", "grad", "linear")
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}  # plain float32 may be TF32

Result = TypeVar("Result", Tensor, tuple[Tensor, ...], tuple[Tensor, Tensor])

# Not a context variable: backward() runs in threads of its own, which do not inherit those.
_only: tuple[str, ...] | None = None


@contextmanager
def only(*names: str) -> Iterator[None]:
    """Inside, these kernels alone are switched on; without a name, none."""
    global _only
    before, _only = _only, _known(names, "only()")
    try:
        yield
    finally:
        _only = before


def switched_on() -> tuple[str, ...]:
    """The names that `only`, or else LORAKIT_KERNELS, switch on."""
    if _only is not None:
        return _only
    value = os.environ.get("LORAKIT_KERNELS", "1").strip()
    if value in ("", "1"):
        return NAMES
    return () if value == "0" else _known([name.strip() for name in value.split(",")], "LORAKIT_KERNELS")


def asked_for(name: str) -> bool:
    """Whether `only` names it: then it is used even where there is nothing to time."""
    return _only is not None and name in _only


def agree(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether each tensor is the other up to the rounding of `dtype`, measured by the largest element."""
    return all(
        bool((left.float() - right.float()).abs().max() <= TOLERANCE[dtype] * right.float().abs().max())
        for left, right in zip(got, expected, strict=True)
        if right.numel()
    )


def sound(
    name: str, dtype: torch.dtype, kernel: Callable[[], Sequence[Tensor]], plain: Callable[[], Sequence[Tensor]]
) -> bool:
    """Whether the kernel runs and agrees with the plain way; if not, a warning says so."""
    try:
        fault = "" if agree(kernel(), plain(), dtype) else "its result differs from plain torch's"
    except Exception as error:  # a compiler's, a driver's or a launcher's: any of them means the plain way
        fault = f"it raised {type(error).__name__}: {error}"
    if fault:
        warnings.warn(
            f"lorakit's kernel {name!r} is not used for {dtype}: {fault}. Plain torch takes its place. To silence this "
            f"set LORAKIT_KERNELS to 0 for no kernels, or to a list of those to use, of {', '.join(NAMES)}.",
            stacklevel=2,
        )
    return not fault


class Trials:
    """Runs the faster of two ways; on the first call with a key both are checked against each other and timed.

    A trial is about forty runs, and for their length the memory of a second and a third result.
    A key starts with the kernel's name. `clock` runs a function a few times and returns the seconds of one run.
    """

    def __init__(self, clock: Callable[[Callable[[], object]], float]) -> None:
        self.clock = clock
        self.faster: dict[tuple[Any, ...], bool] = {}  # key: is it the kernel?

    def run(
        self,
        key: tuple[Any, ...],
        kernel: Callable[..., Result],
        plain: Callable[..., Result],
        arguments: tuple[Any, ...],
        drawn: Callable[[], tuple[Any, ...]],
    ) -> Result:
        """The result of the faster way on `arguments`. The trial is on `drawn()`: arguments of the same shapes."""
        timed = not torch.are_deterministic_algorithms_enabled()
        if timed and key not in self.faster and not is_capturing():
            with torch.no_grad():
                self._try(key, kernel, plain, drawn())
        return (kernel if timed and self.faster.get(key) else plain)(*arguments)

    def _try(
        self, key: tuple[Any, ...], kernel: Callable[..., Result], plain: Callable[..., Result], drawn: tuple[Any, ...]
    ) -> None:
        expected = sequence(plain(*drawn))
        if not all(bool(tensor.isfinite().all()) for tensor in expected):
            return  # float16 has overflowed, and agrees with nothing: another call will tell
        agrees = sound(key[0], expected[0].dtype, lambda: sequence(kernel(*drawn)), lambda: expected)
        self.faster[key] = agrees and self.clock(lambda: kernel(*drawn)) < self.clock(lambda: plain(*drawn))


def event_seconds(run: Callable[[], object]) -> float:
    """The shortest of three times on the current CUDA device, each the mean of five runs in a row, after one more."""
    run()
    times = []
    for _ in range(3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(5):
            run()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 5000)
    return min(times)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured, which allows no waiting and so no comparison."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def sequence(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def _known(names: Sequence[str], where: str) -> tuple[str, ...]:
    for name in names:
        if name not in NAMES:
            raise ValueError(f"{where} names {name!r}, expected some of: {', '.join(NAMES)}")
    return tuple(names)
