"""Reading files. Whatever is wrong with a file is an error that names it and, if possible, the line.

Raises OSError for a file that cannot be read, LoraError for wrong contents. Imports nothing heavy.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, TypeVar

from .errors import LoraError
from .words import suggestion

Kind = TypeVar("Kind", dict[str, Any], list[Any])

_POINTER = b"version https://git-lfs.github.com/spec/"
# UTF-32 begins like UTF-16, so it is tested first.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
_WORDS = {dict: "an object {…}", list: "a list […]", str: "text", bool: "true or false", int: "a number",
          float: "a number", type(None): "null"}  # fmt: skip


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte-order mark."""
    return decoded(bytes_of(path), str(path))


def decoded(data: bytes, name: str) -> str:
    """The text of bytes in UTF-8, with or without a byte-order mark. name: that of their file, for errors."""
    for mark, encoding in _OTHER_ENCODINGS.items():
        if data.startswith(mark):
            raise LoraError(f"{name}:1: the file is {encoding}; save it as UTF-8.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The error's position does not count the byte-order mark.
        start = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
        line = data[:start].count(b"\n") + 1
        raise LoraError(f"{name}:{line}: not UTF-8 (byte {start}); save the file as UTF-8.") from None


def bytes_of(path: Path) -> bytes:
    """The bytes of a file, which may be empty."""
    refuse_pointer(path)
    return path.read_bytes()


def refuse_pointer(path: Path) -> None:
    """Raise LoraError for a git-lfs pointer, which is there in place of a large file, and OSError if unreadable."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise said(error, path) from None
    if start == _POINTER:
        raise LoraError(
            f"{path} is a git-lfs pointer and not the file itself: the repository was cloned without git-lfs. "
            f"Fetch it with `git lfs pull`, run in {path.parent}."
        )


def json_of(path: Path, kind: type[Kind]) -> Kind:
    """The object or the list that a JSON file holds."""
    text = text_of(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_repetition)
    except json.JSONDecodeError as error:
        found = f"{error.msg} at column {error.colno}" if text.strip() else "the file is empty"
        raise LoraError(f"{path}:{error.lineno}: not JSON: {found}.") from None
    except _Repeated as error:
        raise LoraError(f"{path}: {error.args[0]!r} stands in it twice.") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits; thousands of brackets
        raise LoraError(f"{path}: not JSON that can be read: {error}.") from None
    if not isinstance(value, kind):
        raise LoraError(f"{path}: expected {_WORDS[kind]}, found {_WORDS[type(value)]}.")
    return value


class _Repeated(Exception):
    """A key that stands twice in one JSON object."""


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _Repeated(key)
        found[key] = value
    return found


def said(error: OSError, path: Path) -> OSError:
    """The same error with a message that names the path and, if it may be misspelt, what was perhaps meant."""
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(missing(path))
    if path.is_dir():
        return IsADirectoryError(f"{path} is a folder, not a file.")
    return type(error)(f"{path}: {(error.strerror or str(error)).lower()}.")


def missing(path: Path) -> str:
    """The message that nothing is at `path`, with what was perhaps meant: an entry of the nearest existing folder."""
    for part in (path, *path.parents):
        if part.parent.is_dir():
            try:
                near = suggestion(part.name, (entry.name for entry in part.parent.iterdir()))
            except OSError:
                near = ""
            inside = "" if part == path else f" ({part.parent} holds no {part.name!r})"
            return f"{path}: no such file or folder{inside}.{near}"
    return f"{path}: no such file or folder."
