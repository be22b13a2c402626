"""Where the runs of a comparison are made: in this process, or as `processes.py` has it.

Nothing heavy is imported here, so that a process which makes one run imports no more than that run needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from .config import MethodConfig

if TYPE_CHECKING:
    from .tasks import StudyTask


@dataclass(frozen=True)
class Order:
    """What run is to be made."""

    key: str  # of the run, see `Run`
    config: MethodConfig
    seed: int
    learning_rate: float
    weights: Path  # a file for what the best run of a search has trained
    rivals: Mapping[float, float | None] | None = None  # the search's earlier rates and their scores; None: no search
    trained: Path | None = None  # a file with what the run came to in one pass with others; None: it is trained alone


class Watch(Protocol):
    """Whom a run tells how far it is."""

    def step(self) -> None: ...

    def says(self, what: str) -> None: ...


Result = TypeVar("Result")


class Runner(Protocol):
    """Where runs are made. alone: whether each has a process of its own, so that its peak memory is its own."""

    alone: ClassVar[bool]

    def do(
        self, work: Callable[[StudyTask, Order, Watch], Result], task: StudyTask, order: Order, watch: Watch
    ) -> Result:
        """What work(task, order, watch) returns; an exception keeps its type and its message."""


class ThisProcess:
    """Makes runs in this process: without the time that a process takes to start, and for any task."""

    alone: ClassVar[bool] = False

    def do(
        self, work: Callable[[StudyTask, Order, Watch], Result], task: StudyTask, order: Order, watch: Watch
    ) -> Result:
        return work(task, order, watch)
