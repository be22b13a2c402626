"""Silence the notices of libraries within a block, and restore the earlier settings afterwards."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from .terminal import is_watched


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the block, libraries print only errors; lorakit itself says what concerns the user.

    The levels are process-wide, so the block is a whole command or one call of `train` or `compare`.
    """
    from transformers.utils import logging as of_transformers

    verbosity = of_transformers.get_verbosity()
    of_transformers.set_verbosity_error()
    loggers = [logging.getLogger(name) for name in ("trl", "accelerate", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        of_transformers.set_verbosity(verbosity)
        for logger, level in zip(loggers, levels, strict=True):
            if logger.level == logging.ERROR:  # otherwise a library imported meanwhile set its level
                logger.setLevel(level)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Within the block, loading prints no notices, and no progress bars unless stderr is a terminal."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    unseen = contextlib.nullcontext() if is_watched() else contextlib.redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), unseen:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
