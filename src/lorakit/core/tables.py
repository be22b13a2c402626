"""Embeddings whose table is read whole instead of looked up in, such as DeBERTa's relative positions.

An embedding's update starts with A at zero, so a token that never occurs keeps its row exactly. In a table that is read
whole every row occurs, so its update starts as a matrix's does, with B at zero. Whether a table is read whole is
guessed from the module's source. A wrong guess does little harm, because ΔW = 0 at first either way.
"""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn

_READ = re.compile(r"\bself\.(\w+)(?:\[[^]]*\])?\.weight\b(?!\.(?:data|device|dtype|shape)\b)")


def tables_read_whole(module: nn.Module) -> list[nn.Embedding]:
    """The embeddings, and those in lists, that the code of `module` reads and never calls."""
    tables = []
    for name, child in module._modules.items():
        entries = list(child.children()) if isinstance(child, nn.ModuleList) else [child]
        embeddings = [entry for entry in entries if isinstance(entry, nn.Embedding)]
        if embeddings and name in _names_read(type(module)):  # type: ignore[arg-type]  # classes are hashable
            tables += embeddings
    return tables


def may_call(module: nn.Module, child: str) -> bool:
    """Whether the code of `module` calls its child of this name, as far as the code can be seen."""
    source = _code(type(module))  # type: ignore[arg-type]  # classes are hashable
    return not source or _calls(source, child)


@functools.cache
def _names_read(cls: type) -> frozenset[str]:
    source = _code(cls)
    return frozenset(name for name in _READ.findall(source) if not _calls(source, name))


@functools.cache
def _code(cls: type) -> str:
    """The source of the class and of its bases up to nn.Module."""
    return "".join(map(_source, cls.__mro__[: cls.__mro__.index(nn.Module)]))


def _calls(source: str, name: str) -> bool:
    return re.search(rf"\bself\.{name}(\[[^]]*\])?\(", source) is not None


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # the class was made at run time
        return ""
