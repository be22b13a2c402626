"""Progress bars on standard error that stay bars in a narrow terminal, and that only a terminal shows.

tqdm gives the bar what the text leaves, down to one cell. Here the text gives way until the bar has ten cells: first a
long description is cut, then the rate, the description, the time that has passed and the last values are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm.auto import tqdm
from tqdm.utils import disp_len

from .terminal import is_watched

T = TypeVar("T")
_DESCRIBED = 12  # characters of a description that are kept for as long as there is anything else to leave out
_WITHOUT_RATE = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_SHORTEST = "{l_bar}{bar}| {n_fmt}/{total_fmt} [<{remaining}{postfix}]"


class Bar(tqdm):
    """tqdm's bar, with shorter text in a narrow terminal."""

    @staticmethod
    def format_meter(n: float, total: float | None, elapsed: float, ncols: int | None = None, **parts: Any) -> str:
        """The line of the bar. parts: tqdm's other arguments."""

        def line(width: int | None, changed: dict[str, Any]) -> str:
            return str(tqdm.format_meter(n, total, elapsed, ncols=width, **(parts | changed)))

        chosen: dict[str, Any] = {}
        if ncols and total:
            for chosen in _shorter(parts.get("prefix") or "", disp_len(line(None, {})) - ncols):
                if disp_len(line(None, chosen)) <= ncols:  # without a width, tqdm's bar has ten cells
                    break
        return line(ncols, chosen)


def progress_bar(
    items: Iterable[T] | None = None,
    *,
    total: int | None,
    doing: str,
    unit: str = "it",
    leave: bool = False,
    delay: float = 0,
    initial: int = 0,
) -> Bar:
    """A bar on standard error if that is a terminal, else an object that shows nothing.

    items: what is counted as it is read; without them, `update` counts. leave: the bar stays there when it is full.
    delay: seconds before it appears. The unit "B" is shown with k, M and G.
    """
    return Bar(
        items,
        desc=doing,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        leave=leave,
        delay=delay,
        initial=initial,
        dynamic_ncols=True,
        disable=not is_watched(),
    )


def progress(rows: Iterable[T], doing: str, total: int | None = None) -> Iterable[T]:
    """The rows, with a bar if they take longer than a second."""
    if total is None and isinstance(rows, Sequence):
        total = len(rows)
    shown: Iterable[T] = progress_bar(rows, total=total, doing=doing, unit=" rows", delay=1)
    return shown


def _shorter(description: str, over: int) -> Iterator[dict[str, Any]]:
    """What tqdm is given instead, the least change first. over: by how many characters the whole line is too long."""
    yield {}
    kept = max(_DESCRIBED, len(description) - over)
    if kept < len(description):
        description = f"{description[: kept - 1]}…"
    for bar_format in (None, _WITHOUT_RATE):
        yield {"prefix": description, "bar_format": bar_format}
    for bar_format in (_WITHOUT_RATE, _SHORTEST):
        yield {"prefix": "", "bar_format": bar_format}
    yield {"prefix": "", "bar_format": _SHORTEST, "postfix": None}
