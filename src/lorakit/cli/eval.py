"""`lorakit eval`: score the base model and the adapter side by side on a data file."""

from __future__ import annotations

import argparse

from ..core.errors import LoraError
from ..core.paths import expanded
from ..training.settings import number_type
from .generate import add_model_arguments, add_quantize_argument, add_style_arguments

HELP = "score a model or an adapter on a data file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, several=True)
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
    from ..training.adapter_folder import adapters_in
    from ..training.data import read_data
    from ..training.evaluate_several import evaluate_several
    from ..training.preflight import check_result
    from ..training.prepare import fields_of
    from ..training.report import comparison, comparison_of_several
    from ..training.several import load_several, named_adapters
    from ..training.terminal import to_width

    if args.json:
        check_result(Path(args.json), "--json")
    named = named_adapters(args.model, args.adapter)
    # Only those that have a name are meant by rows.
    names = [name for name, _ in args.adapter] or list(adapters_in(args.model))
    data = read_data(args.data, fields=fields_of(args), holdout=0.0, model=named.task, adapters=names)
    if data.task != named.task.kind:
        who = args.model or args.adapter[0][1]
        raise LoraError(f"{args.data} holds {data.shape} rows, and {who} is {named.task}: give it text and label.")
    splits = {"test": data.test, "valid": data.valid, "train": data.train}
    split = next(name for name, rows in splits.items() if rows)
    several = load_several(named, dtype=args.dtype, quantize=args.quantize)
    result = evaluate_several(
        several,
        data,
        split,
        splits[split][: args.max_samples],
        system=args.system,
        plain=args.plain,
        max_length=args.max_seq_length,
        max_new_tokens=args.max_new_tokens,
    )
    for note in (*data.notes, *several.notes(list(named.folders))):
        print(to_width(f"note: {note}"))
    rows = f"rows of {args.data}" + (f" ({split})" if len([own for own in splits.values() if own]) > 1 else "")
    if result.alone is not None:
        print(comparison(result.alone, shown=args.show, rows=rows, adapted=bool(named.folders)))
    else:
        print(comparison_of_several(result, shown=args.show, rows=rows))
    if args.json:
        with replacing(Path(args.json)) as path:
            path.write_text(
                json.dumps(dataclasses.asdict(result.alone or result), indent=2, ensure_ascii=False) + "\n",
                encoding="utf-8",
            )
