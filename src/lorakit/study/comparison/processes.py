"""A process for each run, so that its peak memory holds nothing that earlier runs left.

The process is spawned, not forked: it has only what is sent to it, the task and the order in a file, and shares no
memory, threads or GPU context with this one. It reports steps and its result through a pipe. This process keeps the
ledger, the search and the tables.

    Ctrl-C           a terminal sends it to both; the run's process has it blocked, and is ended by this one
    this one ends    a thread of the run's process sees it and ends that too, also after SIGKILL
    an exception     arrives with its type and message; its cause holds the traceback that it had there

A run takes longer by one start of Python with torch and transformers, 8 seconds of one core with every library of the
extras installed, and loads the model again. The time is in `Run.other_seconds`, and in no time that is compared.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from tqdm import tqdm

from ...core.errors import LoraError, RaisedElsewhere
from ...training.quiet import quiet_libraries
from ..methods.naming import name_of
from .runner import Order, Watch

if TYPE_CHECKING:
    from .tasks import StudyTask

Result = TypeVar("Result")


class OwnProcess:
    """Makes each run in a process of its own. The task must be one that pickle can send there: its class stands at the
    top level of a module, or of a program whose start is guarded by `if __name__ == "__main__"`.
    """

    alone: ClassVar[bool] = True

    def do(
        self, work: Callable[[StudyTask, Order, Watch], Result], task: StudyTask, order: Order, watch: Watch
    ) -> Result:
        sent = order.weights.with_name("order")
        try:
            torch.save((work, task, order), sent)  # pickle alone would write a storage once for each of its views
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise _not_sent(task.name, error) from error
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(sent, task.name, torch.get_num_threads(), theirs))
        try:
            with _interrupts_held(), _bars_below():
                process.start()
            theirs.close()
            result: Result = _result(ours, watch)
            return result
        except EOFError:
            process.join()
            raise LoraError(_ended(f"{task.name}: {name_of(order.config.method)}", process.exitcode or 0)) from None
        finally:
            if process.pid is not None:
                process.terminate()
                process.join()
            ours.close()


def _result(pipe: connection.Connection, watch: Watch) -> Any:
    """Pass on what the run says until it is done. Raises EOFError if its process ends before."""
    while True:
        kind, content = pipe.recv()
        if kind == "step":
            watch.step()
        elif kind == "says":
            watch.says(content)
        elif kind == "failed":
            error, cause = content
            raise error from cause
        else:
            return content


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold back Ctrl-C until the end of the block. A process that is started meanwhile never gets it.

    It inherits the mask. That alone does not hold it back here: another thread takes the signal, and Python then calls
    the handler in this one.
    """
    resource_tracker.ensure_running()  # if it had to be started within the block, it would end the mask
    came: list[Any] = []
    in_main = threading.current_thread() is threading.main_thread()  # only there a handler can be set
    handler = signal.signal(signal.SIGINT, lambda *now: came.append(now)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if came and callable(handler):
        handler(*came[0])


@contextlib.contextmanager
def _bars_below() -> Iterator[None]:
    """A process that is started in the block draws its progress bars below the two of this one."""
    before = os.environ.get("TQDM_POSITION")
    os.environ["TQDM_POSITION"] = before or "2"  # tqdm reads it when it is imported
    try:
        yield
    finally:
        if before is None:
            del os.environ["TQDM_POSITION"]


def _ended(run: str, code: int) -> str:
    how = f"with exit code {code}; what it printed stands above"
    if code < 0:
        how = f"by {signal.Signals(-code).name}"
    if code == -signal.SIGKILL:
        how += ", as the system does when memory runs out; smaller batches and shorter rows need less"
    return f"{run}: the process of the run was ended {how}. The same command goes on after the last finished run."


def _not_sent(task: str, error: Exception) -> LoraError:
    return LoraError(
        f"the task {task} cannot be sent to a process of its own ({type(error).__name__}: {error}). Define its class "
        "at the top level of a module, without lambdas in its attributes; or make all runs in this process: "
        "compare(…, runner=ThisProcess())."
    )


# --- in the run's process ------------------------------------------------------------------------------------------


class _Piped:
    """A `Watch` at the other end of the pipe."""

    def __init__(self, pipe: connection.Connection) -> None:
        self._pipe = pipe

    def step(self) -> None:
        self._pipe.send(("step", None))

    def says(self, what: str) -> None:
        self._pipe.send(("says", what))


def _work(sent: Path, task_name: str, threads: int, pipe: connection.Connection) -> None:
    """Do the work that was sent, and report through the pipe."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own is also for other processes, and would outlive this one if that is ended
    try:
        with quiet_libraries():
            logging.disable(logging.WARNING)  # what importing libraries has to say, the first process has said
            try:
                work, task, order = torch.load(sent, weights_only=False)
            except (AttributeError, ImportError) as error:
                raise _not_sent(task_name, error) from error
            logging.disable(logging.NOTSET)
            pipe.send(("done", work(task, order, _Piped(pipe))))
    except Exception as error:
        pipe.send(("failed", _sendable(error)))


def _sendable(error: Exception) -> tuple[Exception, RaisedElsewhere]:
    """The error, and where it was raised. An error that pickle cannot copy becomes a RuntimeError with its text."""
    cause = RaisedElsewhere.of(error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}"), cause
    return error, cause


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
