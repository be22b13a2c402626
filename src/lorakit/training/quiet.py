"""Silence while a library loads a model."""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without the notices of loading, and without its progress bars where nobody watches them."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    unseen = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
    try:
        with warnings.catch_warnings(), unseen:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
