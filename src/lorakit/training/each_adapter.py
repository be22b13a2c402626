"""The end of a run whose rows name their adapters: a folder for each adapter, complete in itself, and its own score.

OUT/adapters/fr/    adapter_config.json, adapter_model.safetensors, tokenizer, style.json, config.yaml, README.md
OUT/README.md       all of them, with their scores
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..bank.bank import Bank
from ..core.table import Table
from ..formats import save
from .adapter_folder import ADAPTERS
from .card import front_matter, public
from .evaluate_several import evaluate_several
from .models import Loaded
from .prepare import Prepared
from .report import SeveralEvaluations, metric_value
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


def card_of_all(base_model: str, data: str, names: Iterable[str], result: SeveralEvaluations | None) -> str:
    """README.md of the output folder: which adapters there are, what each came to, how to use them."""
    scores: Mapping[str, dict[str, tuple[float, float]]] = (
        {} if result is None else {name: own.metrics for name, own in result.by_adapter.items()}
    )
    metrics = list(dict.fromkeys(metric for own in scores.values() for metric in own))
    rows = []
    for name in names:
        cells = []
        for metric in metrics:
            found = scores.get(name, {}).get(metric)
            cells.append("" if found is None else " → ".join(metric_value(metric, value) for value in found))
        rows.append((f"{ADAPTERS}/{name}", *cells))
    table = Table(("adapter", *(f"{metric}: base → adapter" for metric in metrics)), tuple(rows), left=frozenset({0}))
    return "\n".join(
        (
            front_matter(public(base_model), data=data),
            f"# LoRA adapters for {Path(public(base_model)).name}",
            "",
            f"Data: `{public(data)}`. Each adapter was trained on the rows that name it, and is scored on its own",
            "held-out rows.",
            "",
            table.markdown(),
            "",
            "`lorakit generate`, `chat` and `eval` take this folder as `--model` and load all of them; each folder",
            "alone is an adapter in PEFT's format.",
            "",
        )
    )
