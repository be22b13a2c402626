"""Writing files that are complete or absent: to a temporary name beside the target, then renamed over it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# What libraries in other languages say of a write that failed; none of them names the file.
_FAILED_WRITES = ("os error", "I/O error", "inline_container", "PytorchStreamWriter", "unexpected pos")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; renamed to `path` when the block ends well, removed when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """A write that fails inside, on a full disk, becomes an OSError that names `path` and the space that is left."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError):
            if error.filename is not None or error.errno is None:  # it says already where, or it is one of ours
                raise
            reason = error.strerror
        elif any(sign in str(error) for sign in _FAILED_WRITES):
            reason = str(error).splitlines()[0]
        else:
            raise
        existing = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(existing).free / 1e6
        raise OSError(f"{path} could not be written: {reason}. {free:,.1f} MB are free there.") from error


def sync(path: Path) -> None:
    """Wait until `path`, a file or a folder with all that is in it, is on the disk: a rename must not overtake it."""
    if path.is_dir():
        for entry in path.iterdir():
            sync(entry)
        if os.name == "nt":  # Windows does not open folders
            return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, where there is one. A link goes, what it points at stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
