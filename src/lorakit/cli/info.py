"""`lorakit info`: what an adapter's files hold, without loading a model."""

from __future__ import annotations

import argparse

from ..core.paths import expanded

HELP = "show what an adapter holds"
EXTRA = ""  # needs no extra packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=expanded, help="an adapter's folder (PEFT's format)")
    parser.add_argument("--modules", action="store_true", help="list every module")


def run(args: argparse.Namespace) -> None:
    from collections import Counter

    from ..core.report import numberless
    from ..core.table import Table
    from ..formats import peft
    from ..training.adapter_folder import check_adapter

    check_adapter(args.adapter)  # its message explains what the folder is instead
    adapter = peft.stored_adapter(args.adapter)
    updates = adapter.updates
    count = sum(tensor.numel() for update in updates.values() for tensor in update.tensors().values())
    whole = sum(tensor.numel() for tensor in adapter.trained.values())
    in_rows = sum(rows.values.numel() for rows in adapter.token_rows.values())
    settings = Counter(
        (update.kind, update.rank, f"{update.alpha:g}", f"{update.scale:g}", update.magnitude is not None)
        for update in updates.values()
    )
    print(f"base model    {adapter.base_model or 'not named'}")
    print(f"task          {adapter.task_type or 'not named'}: {_use(args.adapter, adapter.base_model)}")
    alike = Counter(map(numberless, adapter.targets))
    print(f"targets       {', '.join(f'{name} ×{count}' if count > 1 else name for name, count in alike.items())}")
    for (kind, rank, alpha, scale, dora), modules in settings.items():
        print(f"{modules:>4} × {kind:<7} rank {rank}, alpha {alpha}, scale {scale}{', DoRA' if dora else ''}")
    for name, own_rows in adapter.token_rows.items():
        shown = ", ".join(map(str, own_rows.tokens[:8])) + (" …" if len(own_rows.tokens) > 8 else "")
        print(f"tokens        {shown}: their rows of {name} are trained")
    of_tables = f", {in_rows:,} in rows of token tables" if in_rows else ""
    print(f"parameters    {count:,} in factors, {whole:,} trained whole{of_tables}; dtype {_dtypes(adapter)}")
    groups: dict[tuple[str, int], list[int]] = {}
    for name, update in updates.items():
        own = sum(tensor.numel() for tensor in update.tensors().values())
        groups.setdefault((name if args.modules else numberless(name), update.rank), []).append(own)
    rows = [
        (name, f"×{len(own)}" if len(own) > 1 else "", str(rank), f"{sum(own):,}")
        for (name, rank), own in groups.items()
    ]
    rows += [
        (name, "", "1 row" if len(own.tokens) == 1 else f"{len(own.tokens)} rows", f"{own.values.numel():,}")
        for name, own in adapter.token_rows.items()
    ]
    rows += [(name, "", "whole", f"{tensor.numel():,}") for name, tensor in adapter.trained.items()]
    for line in Table(("module", "", "rank", "parameters"), tuple(rows)).lines():
        print(f"  {line}")


def _use(folder: str, base: str | None) -> str:
    """What the adapter is for, as far as local files tell. Nothing is downloaded."""
    from pathlib import Path

    from ..training.task import model_task

    here = base if base and Path(expanded(base)).exists() else None
    try:
        return str(model_task(here, folder))
    except (ImportError, OSError, ValueError) as problem:
        return str(problem)


def _dtypes(adapter: object) -> str:
    tensors = [t for u in adapter.updates.values() for t in u.tensors().values()]  # type: ignore[attr-defined]
    return ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
