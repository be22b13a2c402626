"""The end of a run whose rows name their adapters: a folder for each adapter, complete in itself, and its own score.

OUT/adapters/fr/    adapter_config.json, adapter_model.safetensors, tokenizer, style.json, config.yaml, README.md
OUT/README.md       all of them, with their scores
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from ..bank.bank import Bank
from ..core.numbers import short_number
from ..core.table import Table
from ..formats import save
from .adapter_folder import ADAPTERS
from .card import front_matter, public
from .evaluate_several import evaluate_several
from .models import Loaded
from .outcome import last_losses, lines_of
from .prepare import Prepared
from .report import Evaluation, SeveralEvaluations, metric_value
from .several import NamedAdapters, Several
from .task import Task


def save_each(bank: Bank, names: Iterable[str], out: Path, write_settings: Callable[[Path], None]) -> None:
    """Write the folder of each adapter. write_settings: writes into a folder what a model is asked by."""
    for name in names:
        own = out / ADAPTERS / name
        own.mkdir(parents=True)
        bank.use(name)
        save(bank.model, own)
        write_settings(own)
    bank.use(None)


def score_each(prepared: Prepared, loaded: Loaded, bank: Bank, out: Path) -> SeveralEvaluations | None:
    """Score every adapter on its own held-out rows, as `lorakit eval` does with the folders; None without rows.

    out: the output folder, in which the adapters are.
    """
    config = prepared.config
    split, examples = prepared.data.heldout
    rows = [row for row in examples if row.adapter in bank][: config.eval_samples]
    if not rows:
        return None
    folders = {name: str(out / ADAPTERS / name) for name in bank}
    named = NamedAdapters(config.model, folders, Task("causal-lm"))
    several = Several(named, bank, dict.fromkeys(folders.values(), loaded))
    return evaluate_several(
        several,
        prepared.data,
        split,
        rows,
        max_length=config.max_seq_length,
        max_new_tokens=config.max_new_tokens,
    )


def table_of(names: Iterable[str], history: Sequence[Mapping[str, float]], result: SeveralEvaluations | None) -> Table:
    """A line for each adapter: its last losses, its held-out rows and its scores on them, as far as there are any."""
    found: Mapping[str, Evaluation] = {} if result is None else result.by_adapter
    names, losses = list(names), ("training", "held-out")
    metrics = list(dict.fromkeys(metric for name in names if name in found for metric in found[name].metrics))
    rows = []
    for name in names:
        last, own = last_losses(lines_of(history, name)), found.get(name)
        cells = [short_number(last[kind]) if kind in last else "" for kind in losses]
        cells.append("" if own is None else str(own.rows))
        for metric in metrics:
            values = () if own is None else own.metrics.get(metric, ())
            cells.append(" → ".join(metric_value(metric, value) for value in values))
        rows.append((name, *cells))
    filled = [any(column) for column in zip(*rows, strict=True)]
    head = (
        "adapter",
        *(f"{kind} loss" for kind in losses),
        "rows",
        *(f"{metric}: base → adapter" for metric in metrics),
    )
    shown = tuple(title if any_ else "" for title, any_ in zip(head, filled, strict=True))
    return Table(shown, tuple(rows), left=frozenset({0}))


def card_of_all(base_model: str, data: str, table: Table) -> str:
    """README.md of the output folder: which adapters there are, what each came to, how to use them.

    table: what `table_of` gives.
    """
    rows = tuple((f"{ADAPTERS}/{name}", *cells) for name, *cells in table.rows)
    return "\n".join(
        (
            front_matter(public(base_model), data=data),
            f"# LoRA adapters for {Path(public(base_model)).name}",
            "",
            f"Data: `{public(data)}`. Each adapter was trained on the rows that name it, and is scored on its own",
            "held-out rows.",
            "",
            dataclasses.replace(table, rows=rows).markdown(),
            "",
            "`lorakit generate`, `chat` and `eval` take this folder as `--model` and load all of them; each folder",
            "alone is an adapter in PEFT's format.",
            "",
        )
    )
