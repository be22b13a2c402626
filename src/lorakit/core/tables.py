"""Embeddings that are no lookups: tables that their module reads whole, such as DeBERTa's relative positions.

An embedding's update begins with A at zero, so that a token that never occurs keeps its row exactly. Of a table that is
read whole every row occurs: it begins as a matrix does, with B at zero. Either way ΔW = 0 at first, so nothing depends
on it that the source of the module is a guess.
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
    except (OSError, TypeError):  # made at run time
        return ""
