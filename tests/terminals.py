"""A terminal of a chosen width, in which a test runs what a person would."""

import contextlib
import fcntl
import os
import pty
import struct
import sys
import termios
import threading
from collections.abc import Iterator

import pytest


class Screen:
    """What was written to a terminal."""

    text = ""

    @property
    def lines(self) -> list[str]:
        """The lines as they were left; a bar overwrites its line with each of its frames."""
        return [line.rstrip("\r").rpartition("\r")[2] for line in self.text.split("\n")]

    @property
    def frames(self) -> list[str]:
        """Each line, and each state of a line that was overwritten."""
        return [frame for line in self.text.split("\n") for frame in line.split("\r") if frame]


@contextlib.contextmanager
def terminal(width: int) -> Iterator[Screen]:
    """Within the block, standard output and error are a terminal of this width. Its text is whole after the block."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    screen, found = Screen(), bytearray()

    def read() -> None:
        with contextlib.suppress(OSError):  # Linux reports the end as an error
            while data := os.read(ours, 65536):
                found.extend(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with pytest.MonkeyPatch.context() as patch, open(theirs, "w", encoding="utf-8") as stream:
            for name in ("COLUMNS", "LINES", "NO_COLOR"):
                patch.delenv(name, raising=False)
            for name in ("stdout", "stderr", "__stdout__"):
                patch.setattr(sys, name, stream)
            yield screen
    finally:
        reader.join()
        os.close(ours)
        screen.text = found.decode("utf-8").replace("\r\n", "\n")
