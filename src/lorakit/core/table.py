"""One table for everything that is shown in columns: as text, as Markdown, and as data for a page's template.

Table(("module", "rank"), (("q_proj", "8"), ("lm_head", "16")))

module   rank
q_proj      8
lm_head    16
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Cells of text. The columns in `left` are aligned to the left, all others (numbers) to the right.

    A column without any text is not shown. A table may have no head.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})
    marked: frozenset[tuple[int, int]] = frozenset()  # row and column of each highlighted cell

    @property
    def shown(self) -> tuple[int, ...]:
        """The columns that hold anything, in their order."""
        cells = (self.head, *self.rows) if self.head else self.rows
        return tuple(index for index, column in enumerate(zip(*cells, strict=True)) if any(column))

    def lines(self, width: int | None = None, first: int | None = None) -> list[str]:
        """The lines of the table as text, with a star in front of marked cells.

        width: columns beyond this width follow below, beside the first column again. first: cells in the first column
        that are longer than this are broken between words.
        """
        cells = [self.head] if self.head else []
        cells += [
            tuple(f"*{cell}" if (index, column) in self.marked else cell for column, cell in enumerate(row))
            for index, row in enumerate(self.rows)
        ]
        if not cells:
            return []
        names = [folded(row[0], first) if first else [row[0]] for row in cells]
        widths = [max(len(line) for name in names for line in name)]
        widths += [max(len(row[column]) for row in cells) for column in range(1, len(cells[0]))]
        lines: list[str] = []
        for block in _blocks([column for column in self.shown if column], widths, width):
            lines += [""] if lines else []
            for name, row in zip(names, cells, strict=True):
                beside = "".join("  " + self._aligned(row[column], column, widths[column]) for column in block)
                lines += [(self._aligned(name[0], 0, widths[0]) + beside).rstrip(), *name[1:]]
        return lines

    def markdown(self) -> str:
        """The table as GitHub's Markdown, marked cells in bold. Without a head, the head's cells are empty."""
        head = [escaped(self.head[column]) if self.head else "" for column in self.shown]
        rows = [
            [
                f"**{escaped(row[column])}**" if (index, column) in self.marked else escaped(row[column])
                for column in self.shown
            ]
            for index, row in enumerate(self.rows)
        ]
        rule = ["---" if column in self.left else "---:" for column in self.shown]
        return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows))

    def _aligned(self, cell: str, column: int, width: int) -> str:
        return cell.ljust(width) if column in self.left else cell.rjust(width)


def folded(line: str, width: int) -> list[str]:
    """The line broken between words, with further lines indented. "all-linear" is one word. No text: an empty line."""
    return textwrap.wrap(line, width, subsequent_indent="  ", break_on_hyphens=False) or [""]


def escaped(value: Any) -> str:
    """`value` as text that Markdown shows as it is, also in a table's cell."""
    return re.sub(r"([\\|*`\[\]])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def _blocks(columns: Iterable[int], widths: Sequence[int], width: int | None) -> list[list[int]]:
    """The columns that stand beside each other after the first one, in blocks no wider than `width`."""
    blocks: list[list[int]] = [[]]
    for column in columns:
        beside = widths[0] + sum(2 + widths[other] for other in (*blocks[-1], column))
        if width is not None and blocks[-1] and beside > width:
            blocks.append([])
        blocks[-1].append(column)
    return blocks
