"""Several adapters on the same rows, or each row by the adapter that it names.

    each one on all rows      a line for each adapter; the base answers once for all that are asked in the same way
    rows that name theirs     rows of all adapters share a batch (`Bank.rows`), with a line for each adapter and for all

An adapter that cannot be one of several in a batch (DoRA, a head trained whole, …) gets batches of its own. So do
adapters with a chat template, a style or a length of their own: each is asked as it is without the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .adapter_names import NONE
from .data import Data, Example
from .evaluate import Compared, ComparedRow, compare_rows
from .report import SeveralEvaluations
from .several import Several


def evaluate_several(
    several: Several,
    data: Data,
    split: str,
    examples: Sequence[Example],
    *,
    system: str | None = None,
    plain: bool | None = None,
    max_length: int | None = None,
    max_new_tokens: int | None = None,
) -> SeveralEvaluations:
    """Score the base model and the adapters on `examples`, as `evaluate` does with one.

    system, plain, max_length: instead of what each adapter's folder records.
    """

    def compared(name: str | None, rows: Sequence[Example], *, together: bool, known: Compared | None) -> Compared:
        asking = askings[rows[0].adapter if together else name]
        if not together:
            several.bank.use(name)
        try:
            return compare_rows(
                asking.loaded,
                data,
                rows,
                asking.style,
                max_length=asking.max_length,
                max_new_tokens=max_new_tokens,
                bank=several.bank if together else None,
                known=known,
            )
        finally:
            several.bank.use(None)

    def alike(name: str | None) -> tuple[object, ...]:
        """Equal for adapters that are asked in the same way."""
        asking = askings[name]
        return id(asking.loaded.tokenizer), asking.style, asking.max_length

    askings = {
        name: several.asking(name, system=system, plain=plain, max_length=max_length) for name in (*several.bank, None)
    }
    several.bank.use(None)
    examples = list(examples)  # each is known by its identity below
    names: list[str | None] = [*several.bank] or [None]
    if not any(example.adapter is not None for example in examples):
        found: dict[str | None, Compared] = {}
        for name in names:
            known = next((found[other] for other in found if alike(other) == alike(name)), None)
            found[name] = compared(name, examples, together=False, known=known)
        return SeveralEvaluations({name or NONE: own.evaluation(split) for name, own in found.items()}, None)

    groups: dict[tuple[tuple[object, ...], bool, str | None], list[Example]] = {}
    for example in examples:
        own = example.adapter
        shares = own is not None and several.can_share(own)
        groups.setdefault((alike(own), shares, None if shares else own), []).append(example)
    parts = [compared(own, rows, together=shares, known=None) for (_, shares, own), rows in groups.items()]
    whole = _joined(parts, examples)
    lines = {}
    for name in (*names, None):
        mine = tuple(row for row in whole.rows if row.example.adapter == name)
        if mine:
            lines[name or NONE] = replace(whole, rows=mine, notes=()).evaluation(split)
    return SeveralEvaluations(lines, whole.evaluation(split))


def _joined(parts: Sequence[Compared], examples: Sequence[Example]) -> Compared:
    """All rows, in the order of `examples`."""
    by_row: dict[int, ComparedRow] = {id(own.example): own for part in parts for own in part.rows}
    rows = tuple(by_row[id(example)] for example in examples if id(example) in by_row)
    notes = dict.fromkeys(note for part in parts for note in part.notes)
    return Compared(parts[0].metric, rows, tuple(notes))
