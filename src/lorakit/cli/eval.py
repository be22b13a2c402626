"""`lorakit eval`: score the base model and the adapter side by side on a data file."""

from __future__ import annotations

import argparse

from ..core.errors import LoraError
from ..core.paths import expanded
from ..training.settings import number_type
from .generate import add_model_arguments, add_quantize_argument, add_style_arguments

HELP = "score a model or an adapter on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_quantize_argument(parser)
    add_style_arguments(parser)
    parser.add_argument(
        "--data", "--dataset-name", required=True, type=expanded, help="file, folder (its test split) or hub id"
    )
    parser.add_argument("--max-samples", type=number_type(int, at_least=1), help="score only the first rows")
    parser.add_argument(
        "--max-seq-length",
        type=number_type(int, at_least=2),
        help="longest text in tokens, for classifiers and plain text; longer ones are cut (default: as in training)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=number_type(int, at_least=1),
        help="longest answer in tokens (default: 16 more than the longest expected one)",
    )
    parser.add_argument(
        "--show", type=number_type(int, at_least=0), default=3, help="number of answers to print side by side"
    )
    parser.add_argument("--json", metavar="FILE", type=expanded, help="write the metrics and every answer to a file")
    for role in ("prompt", "completion", "text", "label", "messages"):
        parser.add_argument(f"--{role}-field", help=f"the file's key that holds the {role}")


def run(args: argparse.Namespace) -> None:
    import dataclasses
    import json
    from pathlib import Path

    from ..formats.files import replacing
    from ..training.adapter_folder import base_and_adapter
    from ..training.data import read_data
    from ..training.evaluate import evaluate
    from ..training.models import load_with_adapter
    from ..training.preflight import check_result
    from ..training.prepare import fields_of
    from ..training.report import comparison
    from ..training.style import Style, longest_text
    from ..training.task import model_task

    if args.json:
        check_result(Path(args.json), "--json")
    base, adapter = base_and_adapter(args.model, args.adapter)
    task = model_task(base, adapter)
    data = read_data(args.data, fields=fields_of(args), holdout=0.0, model=task)
    if data.task != task.kind:
        raise LoraError(f"{args.data} holds {data.shape} rows, and {args.model} is {task}: give it text and label.")
    splits = {"test": data.test, "valid": data.valid, "train": data.train}
    split = next(name for name, rows in splits.items() if rows)
    loaded = load_with_adapter(args.model, args.adapter, dtype=args.dtype, quantize=args.quantize)
    result = evaluate(
        loaded,
        data,
        split,
        splits[split][: args.max_samples],
        Style.recorded(adapter or base, loaded.tokenizer, system=args.system, plain=args.plain),
        max_length=args.max_seq_length or longest_text(adapter or base),
        max_new_tokens=args.max_new_tokens,
    )
    for note in data.notes:
        print(f"note: {note}")
    rows = f"rows of {args.data}" + (f" ({split})" if len([own for own in splits.values() if own]) > 1 else "")
    print(comparison(result, shown=args.show, rows=rows, adapted=adapter is not None))
    if args.json:
        with replacing(Path(args.json)) as path:
            path.write_text(
                json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
