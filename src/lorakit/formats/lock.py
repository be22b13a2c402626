"""A lock on an output folder that dies with the process that holds it: no stale lock ever has to be removed by hand."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_BYTE = 1 << 20  # Windows locks bytes, and a locked byte cannot be read, so this one lies behind the text
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # a file system without locks


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`, which says who holds it and is removed at the end.

    Raises FileExistsError if another process, or this one, holds it already.
    """
    descriptor = _taken(path)
    try:
        os.truncate(descriptor if os.truncate in os.supports_fd else path, 0)
        os.write(descriptor, f"process {os.getpid()}".encode())
        yield
    finally:
        try:
            if os.name != "nt":
                path.unlink(missing_ok=True)  # while it is held, so it is our own file that is removed
        finally:
            os.close(descriptor)
        if os.name == "nt":
            with contextlib.suppress(OSError):  # another process has opened it already
                path.unlink(missing_ok=True)


def refuse_locked(path: Path) -> None:
    """Raise FileExistsError if a process holds the lock file `path`. Leaves no file behind."""
    if path.is_file():
        descriptor = os.open(path, os.O_RDWR)
        try:
            if not _try(descriptor):
                raise _held(path)
        finally:
            os.close(descriptor)


def _taken(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try(descriptor):
            os.close(descriptor)
            raise _held(path)
        # The holder before us may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
        os.close(descriptor)


def _try(descriptor: int) -> bool:
    """Whether the lock is ours now. Closing the descriptor, or the end of the process, releases it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS and sys.platform != "win32"
    return True


def _held(path: Path) -> FileExistsError:
    who = path.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    return FileExistsError(
        f"{path.parent.parent} is in use: {who} of lorakit writes into it. Wait for it, or choose another --output-dir."
    )
