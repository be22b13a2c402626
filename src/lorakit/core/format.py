"""File formats of adapters: what each of them can do, and which of them a path is in.

A format is an object, or a module, with the attributes of `Format`. `add_format` adds one; `Adapter.load`,
`Adapter.save`, `lorakit.load` and `lorakit.save` know it from then on.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from .errors import LoraError
from .words import suggestion

if TYPE_CHECKING:
    from .adapter import Adapter
    from .host import Host


class Format(Protocol):
    """One way to hold an adapter in a file or a folder."""

    @property
    def name(self) -> str:
        """What `save(…, format=name)` calls it."""
        ...

    @property
    def limits(self) -> str:
        """What it cannot hold and what its readers get wrong, in plain words."""
        ...

    def recognises(self, path: Path) -> bool:
        """Whether the path is in this format: by its contents or, if nothing is there, by its name."""
        ...

    def read(self, path: Path, host: Host | None = None, alpha: float | None = None) -> Adapter:
        """The adapter at the path. Raises OSError, or LoraError naming the file and what is wrong with it.

        host: the model that it is read for, if there is one. It tells what the file leaves out.
        alpha: α, for a format that does not hold it.
        """
        ...

    def write(self, adapter: Adapter, path: Path) -> None:
        """Write the adapter, whole or not at all. Raises LoraError for what the format cannot hold."""
        ...


_formats: dict[str, Format] = {}


def add_format(format: Format) -> None:
    """Register this format. It replaces one of the same name, and is asked before those that are known already."""
    _formats.pop(format.name, None)
    _formats[format.name] = format


def format_of(path: str | Path, name: str | None = None) -> Format:
    """The format of this name, or the one that recognises the path. Raises LoraError if there is none."""
    if name is not None:
        if name not in _formats:
            known = ", ".join(map(repr, _formats))
            raise LoraError(f"format={name!r}: expected one of {known}.{suggestion(name, _formats)}")
        return _formats[name]
    for format in reversed(_formats.values()):
        if format.recognises(Path(path)):
            return format
    raise LoraError(f"{path}: no known format. Give one: format={next(iter(_formats), '…')!r}.")
