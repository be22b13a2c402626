"""What `attach` did, as data and as the table that a person reads."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from .table import Table


@dataclass(frozen=True)
class ModuleRow:
    """One adapted module in a report. shape: (in, out) as the update sees it."""

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    parameters: int


@dataclass(frozen=True)
class Report:
    """What `attach` did. Print it: a table in which modules that differ only in a layer's index share a line."""

    rows: tuple[ModuleRow, ...]
    trained: tuple[str, ...]  # parameters trained whole
    skipped: dict[str, str]
    trainable: int
    total: int
    tables: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)  # trained rows, their width, all rows

    def __str__(self) -> str:
        groups: dict[tuple[str, str, tuple[int, int], int], list[ModuleRow]] = {}
        for row in self.rows:
            groups.setdefault((numberless(row.name), row.kind, row.shape, row.rank), []).append(row)
        cells = []
        for (pattern, kind, (inputs, outputs), rank), rows in groups.items():
            count = sum(row.parameters for row in rows)
            cells.append((pattern, f"×{len(rows)}", kind, f"{inputs} → {outputs}", str(rank), f"{count:,}"))
        head = ("module", "", "kind", "in → out", "rank", "parameters")
        lines = Table(head, tuple(cells), left=frozenset({0, 2})).lines()
        lines += [
            f"rows trained: {name}  {rows:,} of {length:,}  × {width:,}"
            for name, (rows, width, length) in self.tables.items()
        ]
        counts = Counter(numberless(name) for name in self.trained)
        lines += [f"trained whole: {name}  ×{count}" for name, count in counts.items()]
        counts = Counter(f"{numberless(name)}: {reason}" for name, reason in self.skipped.items())
        lines += [f"passed over: {line}" + (f"  ×{count}" if count > 1 else "") for line, count in counts.items()]
        percent = 100 * self.trainable / max(self.total, 1)
        lines.append(f"trainable params: {self.trainable:,} || all params: {self.total:,} || trainable%: {percent:.4f}")
        return "\n".join(lines)


def numberless(name: str) -> str:
    """The name with the index of each numbered layer replaced by a star."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", f".{name}")[1:]
