"""`lorakit eval`: base model and adapter on labelled rows, side by side."""

from __future__ import annotations

import argparse

from ..training.settings import number
from .generate import add_model_arguments

HELP = "score a model or an adapter on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--data", "--dataset-name", required=True, help="file, folder (its test split) or hub id")
    parser.add_argument("--system", help="system message (default: the one used in training)")
    parser.add_argument("--max-samples", type=number(int, at_least=1), help="score only the first rows")
    parser.add_argument(
        "--max-seq-length", type=number(int, at_least=2), default=1024, help="of a classifier's input, in tokens"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=number(int, at_least=1),
        help="longest answer (default: 16 over the longest expected one)",
    )
    parser.add_argument("--show", type=number(int, at_least=0), default=3, help="answers to print side by side")
    parser.add_argument("--json", metavar="FILE", help="write the metrics and every answer to a file")
    for role in ("prompt", "completion", "text", "label", "messages"):
        parser.add_argument(f"--{role}-field", help=f"the file's key that holds the {role}")


def run(args: argparse.Namespace) -> None:
    import dataclasses
    import json
    from pathlib import Path

    from ..formats.files import replacing
    from ..training.data import read
    from ..training.evaluate import Style, compare
    from ..training.models import adapter_of, load_with_adapter
    from ..training.preflight import check_file
    from ..training.prepare import fields_of
    from ..training.report import comparison

    if args.json:
        check_file(Path(args.json), "--json")
    data = read(args.data, fields=fields_of(args), holdout=0.0)
    splits = {"test": data.test, "valid": data.valid, "train": data.train}
    split = next(name for name, rows in splits.items() if rows)
    loaded = load_with_adapter(args.model, args.adapter, dtype=args.dtype)
    style = Style.of_adapter(adapter_of(args.model, args.adapter), loaded.tokenizer, args.system)
    result = compare(
        loaded,
        data,
        split,
        splits[split][: args.max_samples],
        style,
        max_length=args.max_seq_length,
        max_new_tokens=args.max_new_tokens,
    )
    print(comparison(result, shown=args.show))
    if args.json:
        with replacing(Path(args.json)) as path:
            path.write_text(
                json.dumps(dataclasses.asdict(result), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
            )
